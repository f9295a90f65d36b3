"""Disk space of a planned run, at its peak and at its end: checkpoints, exported models, stored responses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from rlhf_pl.cli.plan_estimates import Plan
from rlhf_pl.cli.plan_trainer import PlannedTrainer
from rlhf_pl.models.config_files import has_weights
from rlhf_pl.models.footprint import DTYPE_BYTES, ModelSize
from rlhf_pl.modules.export import export_dtype
from rlhf_pl.rounds.disk_space import CHECKPOINTS
from rlhf_pl.utils.disk import format_bytes, free_bytes

_PROMPT_BYTES = 1000  # of a stored prompt with its ids; 8 bytes a token of a response, and its text and scores
_RESPONSE_BYTES = 200


@dataclass(frozen=True)
class DiskOptions:
    """Options that a run's disk space depends on.

    Args:
        keep_rounds: `checkpoint.keep_rounds`; None without checkpoints.
        every_round: `export.every_round`.
        dtype: `export.dtype`.
    """

    keep_rounds: int | None
    every_round: bool
    dtype: str | None


class _PlannedModel(Protocol):
    """A plan, of whatever kind of run."""

    module: Any
    model: ModelSize
    machine: PlannedTrainer

    def checkpoint(self) -> int:
        """Bytes of a checkpoint."""


def disk_parts(plan: _PlannedModel, options: DiskOptions) -> dict[str, tuple[int, int]]:
    """Bytes of checkpoints and exported models at the run's peak and at its end.

    Args:
        plan: The plan.
        options: The options; a run without a limit of rounds counts as one round.
    """
    number = _rounds(plan)
    parts = {}
    if options.keep_rounds is not None:
        kept = number if options.keep_rounds == -1 else min(options.keep_rounds, number)
        most = min(kept, number - 1) + CHECKPOINTS
        parts[f"checkpoints, {most} at most"] = (most * plan.checkpoint(), kept * plan.checkpoint())
    exports = (1 + number * options.every_round) * _export_width(plan.module.source, options.dtype) * plan.model.total
    return parts | {f"exported model{'s' if options.every_round else ''}": (exports, exports)}


def stored_responses(plan: Plan, prompts: int | None, tokens: float) -> dict[str, tuple[int, int]]:
    """Bytes of all rounds' responses, at the peak and at the end.

    Args:
        plan: The plan.
        prompts: Prompts of a round; None for 1,000.
        tokens: Mean length of a response, tokens.
    """
    number = _rounds(plan)
    response = _RESPONSE_BYTES + 8 * tokens
    stored = int(number * (prompts or 1000) * (_PROMPT_BYTES + plan.options.sampling.num_responses * response))
    return {f"responses of {number} round{'' if number == 1 else 's'}": (stored, stored)}


def disk_table(parts: dict[str, tuple[int, int]], checkpoint: int, run_dir: str) -> Table:
    """The table that `rlhf-pl plan` prints.

    Args:
        parts: Bytes by what they hold, at the peak and at the end.
        checkpoint: Bytes of one checkpoint.
        run_dir: The run directory, on the disk whose free space is shown.
    """
    table = Table("disk", "at the peak", "at the end")
    table.add_row("a checkpoint", format_bytes(checkpoint), "")
    for name, sizes in parts.items():
        table.add_row(name, *(format_bytes(size) for size in sizes))
    table.add_row("sum", *(format_bytes(sum(sizes)) for sizes in zip(*parts.values(), strict=True)), style="bold")
    table.add_row("free now", format_bytes(free_bytes(Path(run_dir).absolute())), "")
    return table


def lacks_space(parts: dict[str, tuple[int, int]], run_dir: str, keep_rounds: int | None) -> str:
    """A sentence if the peak is over the free space, otherwise empty.

    Args:
        parts: Bytes by what they hold, at the peak and at the end.
        run_dir: The run directory.
        keep_rounds: `checkpoint.keep_rounds`.
    """
    peak, free = sum(most for most, _ in parts.values()), free_bytes(Path(run_dir).absolute())
    if peak <= free:
        return ""
    fewer = "" if keep_rounds in (None, 1) else ", or --checkpoint.keep_rounds 1"
    return (
        f"The disk of {run_dir} is too small: the run takes up to {format_bytes(peak)}, and {format_bytes(free)} are "
        f"free. Change first: --trainer.default_root_dir on a larger disk{fewer}."
    )


def _rounds(plan: _PlannedModel) -> int:
    rounds = plan.machine.max_epochs
    return rounds if rounds is not None and rounds > 0 else 1


def _export_width(source: Any, dtype: str | None) -> int:
    """Bytes of an exported weight; of a model whose weights are not here, by its config."""
    if dtype is not None or has_weights(Path(source.path)):
        return export_dtype(source, dtype).itemsize
    declared = source.config.dtype or source.config.get_text_config().dtype or "float32"
    return DTYPE_BYTES.get(str(declared).removeprefix("torch."), 4)
