"""Keeps the sampler in sync with the policy: starts it once, syncs and checks its weights once per policy."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_pl.distributed.gather_weights import Weights
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.models.packed_batch import PackedBatch
from rlhf_pl.rollout.base import EngineSpec, Sampler
from rlhf_pl.rollout.weight_sync.self_check import check_sampler, sync_weights
from rlhf_pl.utils.console import phase


@dataclass(frozen=True)
class PolicySnapshot:
    """A policy to sample from or to compute log-probs with.

    Args:
        weights: Weights by their Hugging Face names, tied ones included.
        logps: (rows, temperature) -> log-probs of the M target tokens, shape (M,), nats.
        rounding: rows -> mean absolute difference per token between float32 and bfloat16 compute, nats.
        fingerprint: `weights_fingerprint` of the weights.
    """

    weights: Weights
    logps: Callable[[PackedBatch, float], Tensor]
    rounding: Callable[[PackedBatch], float]
    fingerprint: str


class SamplerSync:
    """Keeps a sampler's weights in sync with a policy.

    Args:
        sampler: A sampler that has not been started.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self._started = False
        self._synced: PolicySnapshot | None = None

    def ensure_synced(
        self,
        policy: PolicySnapshot,
        spec: EngineSpec,
        prompts: Sequence[Sequence[int]],
        limit: float,
        show: bool,
        ranks: Ranks,
    ) -> dict[str, float]:
        """Sync the sampler to `policy` unless it is in sync, and check the result.

        Args:
            policy: The policy to sample from.
            spec: Used at the first start.
            prompts: Token ids of a few prompts for the check.
            limit: See `check_sampler`.
            show: Whether to show progress.
            ranks: All ranks sync their samplers together.

        Returns:
            Metrics; empty if the sampler was in sync.

        Raises:
            StaleSamplerError: The sampler does not have the policy's weights.
        """
        if self._synced is policy:
            return {}
        self._synced = None
        if not self._started:
            with phase("starting the sampler", enabled=show) as report:
                report(0, self.sampler.start_note)
                self.sampler.start(spec)
            self._started = True
        started = time.monotonic()
        with phase("syncing weights to the sampler", enabled=show):
            self.sampler.wake()
            weights = policy.weights
            sync_weights(self.sampler, weights)
            room = spec.max_model_tokens - max(map(len, prompts))
            error = check_sampler(
                self.sampler, prompts, policy.logps, weights, limit, min(8, room), policy.rounding, ranks
            )
        self._synced = policy
        return {"time/sync_s": time.monotonic() - started, "rollout/sampler_logp_error": error}

    def release_gpu(self) -> None:
        """Release the sampler's memory for training."""
        if self._started:
            self.sampler.sleep()
            # A sampler needs a weight sync after it has slept.
            self._synced = None if torch.cuda.is_available() else self._synced

    def close(self) -> None:
        if self._started:
            self._started, self._synced = False, None
            self.sampler.close()
