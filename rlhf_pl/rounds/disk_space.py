"""Disk space for a round: its responses, its checkpoints and the final model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from rlhf_pl.algorithms.prompt_groups import PER_TOKEN, SAMPLING_LOGPS
from rlhf_pl.checkpointing.checkpoints import checkpoint_files
from rlhf_pl.data.policy_module import PolicyModule
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.rounds.logps_origins import reads_sampled_tokens
from rlhf_pl.rounds.settings import RoundOptions
from rlhf_pl.store.round_store import STAGES
from rlhf_pl.utils.disk import check_space

CHECKPOINTS = 2  # in addition to those kept: that of the last update stays until that of the round's end is complete


def check_disk_space(
    trainer: L.Trainer, module: PolicyModule, data: RoundDataModule, options: RoundOptions, index: int
) -> None:
    """Refuse a round whose responses, checkpoints or final model would not fit on the disk.

    Raises:
        DiskFullError: There is too little space; lists what the round needs.
    """
    parts = {"responses": _response_bytes(module, data, options, index)}
    weights = _bytes(module.weights().like)
    checkpoint = weights * (1 + 2 * _trainable_share(module.policy))
    critic = getattr(module, "critic", None)  # of PPO, a model of its own
    if critic is not None:
        own = _bytes(module.critic_weights().like)  # type: ignore[attr-defined]
        weights, checkpoint = weights + own, checkpoint + own * (1 + 2 * _trainable_share(critic))
    if trainer.checkpoint_callbacks:
        checkpoint = _newest_checkpoint_bytes(data.store.run_dir) or int(checkpoint)
        number = _new_checkpoints(trainer, data.store.run_dir, index)
        parts["a checkpoint" if number == 1 else f"{number} checkpoints"] = number * checkpoint
    if trainer.max_epochs == index + 1:
        parts["final model"] = weights
    check_space(data.store.run_dir, parts, f"round {index + 1}")


def _new_checkpoints(trainer: L.Trainer, run_dir: Path, index: int) -> int:
    """Number of checkpoints that round `index` will hold beyond those on the disk, at the most.

    With `checkpoint.keep_rounds: 1` a later round's first checkpoint takes the place of the one before the newest, so
    that one more is enough. Each is written before an old one is deleted.
    """
    keep = next((c.keep_rounds for c in trainer.checkpoint_callbacks if hasattr(c, "keep_rounds")), -1)
    if keep == -1:
        return CHECKPOINTS
    return max(1, min(CHECKPOINTS, min(keep, index) + CHECKPOINTS - len(checkpoint_files(run_dir))))


def _newest_checkpoint_bytes(run_dir: Path) -> int:
    """Size of the newest checkpoint; 0 if there is none."""
    files = sorted(checkpoint_files(run_dir), key=lambda file: file.stat().st_mtime)
    return sum(f.stat().st_size for f in (files[-1].rglob("*") if files[-1].is_dir() else files[-1:])) if files else 0


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _trainable_share(model: Any) -> float:
    """Share of a model's parameters that train; AdamW keeps two moments of each of them."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad) / max(1, sum(p.numel() for p in parameters))


def _response_bytes(module: PolicyModule, data: RoundDataModule, options: RoundOptions, index: int) -> int:
    """Bytes of a round's files: twice those of the previous round, or those of responses of the maximum length.

    The latter are of all prompts that `rollout.refill` may sample.
    """
    previous = data.store.round(index - 1)
    sizes = [f.stat().st_size for stage in STAGES for f in previous.shards(stage).values()] if index else []
    if sizes:
        return 2 * sum(sizes)
    prompts, sampling = data.round_prompts(index), options.sampling
    prompt_bytes = sum(len(json.dumps(p.messages, default=str)) + 4 * len(p.token_ids) for p in prompts)
    waves = 1 + options.refill
    needs = module.needs
    per_token = {*PER_TOKEN, SAMPLING_LOGPS} & set(needs) | ({PER_TOKEN[0]} if options.store_token_logps else set())
    bytes_per_token = 8 + 4 * (len(per_token) + reads_sampled_tokens(needs, options))
    response_bytes = 200 + bytes_per_token * sampling.max_response_tokens
    return waves * sampling.num_responses * (prompt_bytes + len(prompts) * response_bytes)
