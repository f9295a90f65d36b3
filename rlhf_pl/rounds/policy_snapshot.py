"""Snapshots of the policy: its current state, the starting model, and states from checkpoints."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from rlhf_pl.algorithms.prompt_groups import extra_needs
from rlhf_pl.checkpointing.checkpoints import checkpoint_files, read_progress, read_weights
from rlhf_pl.data.policy_module import PolicyModule, as_lightning
from rlhf_pl.distributed.gather_weights import Weights, like_of, model_weights
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.distributed.strategies import get_callable_policy
from rlhf_pl.models.compute import get_compute
from rlhf_pl.models.lora import adapted_names, plain_name, unwrapped_name
from rlhf_pl.models.packed_batch import PackedBatch
from rlhf_pl.models.policy import PolicyLM, weights_unchanged
from rlhf_pl.models.rounding import round_to
from rlhf_pl.rollout.weight_sync.sync import PolicySnapshot
from rlhf_pl.utils.fingerprints import weights_fingerprint


def snapshot_policy(trainer: L.Trainer, module: PolicyModule) -> PolicySnapshot:
    """Snapshot of the policy that trains. All ranks must call it together."""
    weights = module.weights()
    fingerprint = ranks_of(trainer).broadcast(weights_fingerprint(weights.stream()))
    return _snapshot(trainer, module, get_callable_policy(trainer), weights, fingerprint)


def find_past_policy(trainer: L.Trainer, module: PolicyModule, step: int, fingerprint: str) -> PolicySnapshot | None:
    """Find the policy after an earlier update: the starting model or a checkpoint; None if neither has it.

    Args:
        trainer: The run's Trainer.
        module: Holds the policy.
        step: Updates that the wanted policy had.
        fingerprint: Fingerprint of its weights.
    """
    lm = find_past_lm(trainer, module, step, fingerprint)
    if lm is None:
        return None
    weights = model_weights(as_lightning(module), lm, like_of(lm))
    policy = module.unit(lm.to(module.device)).requires_grad_(False).eval()
    return _snapshot(trainer, module, policy, weights, fingerprint)


def find_past_lm(trainer: L.Trainer, module: PolicyModule, step: int, fingerprint: str) -> Any | None:
    """Find an earlier policy's model, adapters included; None if it is gone. It is on the CPU unless it is in 4 bits.

    Args:
        trainer: The run's Trainer.
        module: Holds the policy.
        step: Updates that the wanted policy had.
        fingerprint: Fingerprint of its weights.
    """
    lm = module.build_lm()
    like = like_of(lm)

    def is_wanted() -> bool:
        return weights_fingerprint(model_weights(as_lightning(module), lm, like).stream()) == fingerprint

    if step == 0 and is_wanted():
        return lm
    for file in checkpoint_files(trainer.default_root_dir):
        progress = read_progress(file)
        if progress is not None and progress.global_step == step:
            lm.load_state_dict(
                read_weights(file, "policy.lm.", lm.state_dict()), strict=as_lightning(module).strict_loading
            )
            if is_wanted():
                return lm
    return None


def _snapshot(
    trainer: L.Trainer, module: PolicyModule, policy: Any, weights: Weights, fingerprint: str
) -> PolicySnapshot:
    rounding = partial(_measure_rounding, trainer, module, policy)
    weights = _as_computed(trainer, as_lightning(module), policy, weights)
    return PolicySnapshot(weights, logps_function(trainer, module, policy), rounding, fingerprint)


def _as_computed(trainer: L.Trainer, module: L.LightningModule, policy: Any, weights: Weights) -> Weights:
    """The weights that log-probs are computed with, in their own dtype: a sampler of any dtype samples that policy.

    Tensors with merged adapters stay exact: log-probs are computed with base and adapters apart.
    """
    compute = get_compute(trainer)
    if compute.dtype != torch.bfloat16 or not (compute.sharded or _has_copy(policy)):
        return weights
    names = {*(unwrapped_name(plain_name(name)) for name, _ in module.named_buffers()), *adapted_names(module)}
    kept = {name.removeprefix("policy.lm.") for name in names}
    cast = torch.Tensor.bfloat16 if compute.sharded else partial(round_to, dtype=torch.bfloat16)  # FSDP: the nearest

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights.stream():
            is_cast = tensor.dtype == torch.float32 and name not in kept
            yield name, cast(tensor.detach()).float() if is_cast else tensor

    return Weights(weights.like, stream)


def _measure_rounding(trainer: L.Trainer, module: PolicyModule, policy: Any, rows: PackedBatch) -> float:
    """Mean change of the policy's log-probs in bfloat16, nats a token; 0 where its weights are not in float32."""
    if module.dtype_name != "float32":
        return 0.0
    device = trainer.strategy.root_device
    inputs = rows.to(device).inputs()
    logps = []
    for enabled in (False, True):
        with (
            _inference(as_lightning(module)),
            _compute_with_stored_weights(policy),
            torch.autocast(device.type, torch.bfloat16, enabled=enabled),
        ):
            logps.append(policy(**inputs))
    return (logps[0] - logps[1]).abs().mean().item()


def logps_function(trainer: L.Trainer, module: PolicyModule, policy: Any) -> Callable[[PackedBatch, float], Tensor]:
    """Function that computes log-probs under `policy`: (rows, temperature) -> those of the rows' targets, shape (M,).

    It computes without gradients, in eval mode and in the run's precision.
    """

    def logps(rows: PackedBatch, temperature: float) -> Tensor:
        device = trainer.strategy.root_device
        with _inference(as_lightning(module)), trainer.precision_plugin.forward_context():
            return policy(**rows.to(device).inputs(), temperature=temperature)

    return logps


def extra_passes(trainer: L.Trainer, module: PolicyModule) -> dict[str, Callable[[PackedBatch, float], Tensor]]:
    """What the module's own methods compute for every token of a round, as it is now: see `PolicyModule.needs`."""

    def compute(name: str, rows: PackedBatch, temperature: float) -> Tensor:
        with _inference(as_lightning(module)), trainer.precision_plugin.forward_context():
            return getattr(module, name)(rows.to(trainer.strategy.root_device), temperature)

    return {name: partial(compute, name) for name in extra_needs(module.needs)}


@contextmanager
def _inference(module: L.LightningModule) -> Iterator[None]:
    """Disables gradients and sets eval mode; restores the mode afterwards."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


def assume_weights_unchanged(module: PolicyModule) -> Any:
    """Context in which the module's weights do not change: see `weights_unchanged`."""
    return weights_unchanged(as_lightning(module))


def _has_copy(policy: Any) -> bool:
    """Whether a policy, or the module around it, computes with a working copy."""
    unit = _unit(policy)
    return unit is not None and unit.copy is not None


def _compute_with_stored_weights(policy: Any) -> Any:
    """Context in which a policy, or the module around it, computes with its stored weights instead of a copy."""
    unit = _unit(policy)
    return nullcontext() if unit is None else unit.using_own_weights()


def _unit(policy: Any) -> PolicyLM | None:
    """The policy itself, or that of the module around it; None for a class of a user's."""
    unit = getattr(policy, "policy", policy)
    return unit if isinstance(unit, PolicyLM) else None
