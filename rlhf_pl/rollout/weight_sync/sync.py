"""The link from the policy to the sampler: started once, given weights once per policy, checked every time."""

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
    """A policy whose answers or log-probs are wanted.

    Args:
        weights: By their Hugging Face names, tied ones included.
        logps: (rows, temperature) -> log-probs of the M wanted tokens, shape (M,), nats.
        rounding: rows -> mean absolute difference per token between float32 and bfloat16 compute, nats.
        fingerprint: `weights_fingerprint` of the weights.
    """

    weights: Weights
    logps: Callable[[PackedBatch, float], Tensor]
    rounding: Callable[[PackedBatch], float]
    fingerprint: str


class SamplerSync:
    """Keeps a sampler at the weights of the policy that is asked for.

    Args:
        sampler: Not started yet.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self._started = False
        self._holds: PolicySnapshot | None = None

    def ensure_synced(
        self,
        policy: PolicySnapshot,
        spec: EngineSpec,
        prompts: Sequence[Sequence[int]],
        limit: float,
        show: bool,
        ranks: Ranks,
    ) -> dict[str, float]:
        """Bring the sampler to `policy`, if it is not there, and check that it is.

        Args:
            policy: Whose answers are wanted.
            spec: For the first start.
            prompts: Token ids of a few prompts for the check.
            limit: See `check_sampler`.
            show: Whether to show progress.
            ranks: All of them bring their samplers there together.

        Returns:
            Metrics; empty if nothing had to be done.

        Raises:
            StaleSamplerError: The sampler is not at the policy's weights.
        """
        if self._holds is policy:
            return {}
        self._holds = None
        if not self._started:
            with phase("starting the sampler", enabled=show) as report:
                report(0, self.sampler.start_note)
                self.sampler.start(spec)
            self._started = True
        started = time.monotonic()
        with phase("handing weights to the sampler", enabled=show):
            self.sampler.wake()
            weights = policy.weights
            sync_weights(self.sampler, weights)
            room = spec.max_model_tokens - max(map(len, prompts))
            error = check_sampler(
                self.sampler, prompts, policy.logps, weights, limit, min(8, room), policy.rounding, ranks
            )
        self._holds = policy
        return {"time/sync_s": time.monotonic() - started, "rollout/sampler_logp_error": error}

    def release_gpu(self) -> None:
        """Give the sampler's memory to training."""
        if self._started:
            self.sampler.sleep()
            # A sampler that slept has to be given its weights again.
            self._holds = None if torch.cuda.is_available() else self._holds

    def close(self) -> None:
        if self._started:
            self._started, self._holds = False, None
            self.sampler.close()
