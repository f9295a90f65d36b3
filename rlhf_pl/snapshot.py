"""Policies at one moment of a run: the present one, the starting one, and those of checkpoints."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from rlhf_pl.checkpoints import checkpoint_files, read_progress
from rlhf_pl.fingerprints import weights_fingerprint
from rlhf_pl.modules.rebel import RebelModule
from rlhf_pl.policy import PolicyLM, load_lm
from rlhf_pl.rows import RowBatch


@dataclass(frozen=True)
class PolicySnapshot:
    """A policy whose answers or log-probs are wanted.

    Args:
        weights: By their Hugging Face names, tied ones included.
        logps: (rows, temperature) -> token log-probs, shape (R, T), nats.
        rounding: rows -> mean absolute difference per token between float32 and bfloat16 compute, nats.
        fingerprint: `weights_fingerprint(weights)`.
    """

    weights: Mapping[str, Tensor]
    logps: Callable[[RowBatch, float], Tensor]
    rounding: Callable[[RowBatch], float]
    fingerprint: str


def present_policy(trainer: L.Trainer, module: RebelModule) -> PolicySnapshot:
    """The policy that trains."""
    weights = module.hf_state_dict()
    return _snapshot(trainer, module, trainer.model, weights, weights_fingerprint(weights))


def find_past_policy(trainer: L.Trainer, module: RebelModule, step: int, fingerprint: str) -> PolicySnapshot | None:
    """The policy of an earlier update, from the model the run started from or from a checkpoint; None if it is gone."""
    lm = load_lm(module.source, module.dtype_name, module.attn_implementation)
    if step == 0 and weights_fingerprint(lm.state_dict()) == fingerprint:
        return _frozen(trainer, module, lm, fingerprint)
    for file in checkpoint_files(trainer.default_root_dir):
        progress = read_progress(file)
        if progress is None or progress.global_step != step:
            continue
        state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        weights = {name.removeprefix("policy.lm."): t for name, t in state.items() if name.startswith("policy.lm.")}
        if weights_fingerprint(weights) == fingerprint:
            lm.load_state_dict(weights)
            return _frozen(trainer, module, lm, fingerprint)
    return None


def _frozen(trainer: L.Trainer, module: RebelModule, lm: Any, fingerprint: str) -> PolicySnapshot:
    policy = PolicyLM(lm.to(module.device), module.logprob_chunk_tokens).requires_grad_(False).eval()
    return _snapshot(trainer, module, policy, lm.state_dict(), fingerprint)


def _snapshot(
    trainer: L.Trainer, module: RebelModule, policy: Any, weights: Mapping[str, Tensor], fingerprint: str
) -> PolicySnapshot:
    rounding = partial(_rounding, trainer, module, policy)
    return PolicySnapshot(weights, logps_function(trainer, module, policy), rounding, fingerprint)


def _rounding(trainer: L.Trainer, module: RebelModule, policy: Any, rows: RowBatch) -> float:
    """What bfloat16 changes in the policy's own log-probs; 0 where its weights are not float32 in the first place."""
    if module.dtype_name != "float32":
        return 0.0
    device = trainer.strategy.root_device
    inputs = (rows.input_ids.to(device), rows.attention_mask.to(device), rows.response_mask.to(device), 1.0)
    found = []
    for enabled in (False, True):
        with _inference(module), torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            found.append(policy(*inputs)[rows.response_mask.to(device)])
    return (found[0] - found[1]).abs().mean().item()


def logps_function(trainer: L.Trainer, module: RebelModule, policy: Any) -> Callable[[RowBatch, float], Tensor]:
    """Token log-probs of rows under `policy`, without gradients, in eval mode, in the run's precision."""

    def logps(rows: RowBatch, temperature: float) -> Tensor:
        device = trainer.strategy.root_device
        with _inference(module), trainer.precision_plugin.forward_context():
            return policy(
                rows.input_ids.to(device), rows.attention_mask.to(device), rows.response_mask.to(device), temperature
            )

    return logps


@contextmanager
def _inference(module: L.LightningModule) -> Iterator[None]:
    """No gradients, eval mode; the mode is restored."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
