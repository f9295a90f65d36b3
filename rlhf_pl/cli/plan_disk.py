"""Disk space of a planned run: checkpoints at their peak, responses, exported models, and what remains at the end."""

from pathlib import Path

from rich.table import Table

from rlhf_pl.cli.plan_estimates import DTYPE_BYTES, Plan
from rlhf_pl.rounds.disk_space import CHECKPOINTS
from rlhf_pl.utils.disk import format_bytes, free_bytes

_PROMPT_BYTES = 1000  # of a stored prompt with its ids; 8 bytes a token of a response, and its text and scores
_RESPONSE_BYTES = 200


def disk_parts(
    plan: Plan, keep_rounds: int, every_round: bool, rounds: int | None, prompts: int | None, tokens: float
) -> dict[str, tuple[int, int]]:
    """Bytes at the run's peak and at its end, by what they hold.

    Args:
        plan: The plan.
        keep_rounds: `checkpoint.keep_rounds`.
        every_round: Whether each round's model is exported, too.
        rounds: Rounds of the run; None or -1 for no limit, which counts as one.
        prompts: Prompts of a round; None for 1,000.
        tokens: Mean length of a response, tokens.
    """
    number = rounds if rounds is not None and rounds > 0 else 1
    kept = number if keep_rounds == -1 else min(keep_rounds, number)
    checkpoint = plan.checkpoint()
    model = DTYPE_BYTES[plan.module.dtype_name] * plan.model.total
    exports = model * (1 + number * every_round)
    sampling = plan.options.sampling
    response = _RESPONSE_BYTES + 8 * tokens
    stored = int(number * (prompts or 1000) * (_PROMPT_BYTES + sampling.num_responses * response))
    return {
        f"checkpoints, {kept + CHECKPOINTS} at most": ((kept + CHECKPOINTS) * checkpoint, kept * checkpoint),
        f"exported model{'s' if every_round else ''}": (exports, exports),
        f"responses of {number} round{'' if number == 1 else 's'}": (stored, stored),
    }


def disk_table(parts: dict[str, tuple[int, int]], checkpoint: int, run_dir: str) -> Table:
    """The table that `rlhf-pl plan` prints.

    Args:
        parts: Bytes as by `disk_parts`.
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


def lacks_space(parts: dict[str, tuple[int, int]], run_dir: str) -> str:
    """A sentence if the peak is over the free space, otherwise empty."""
    peak, free = sum(most for most, _ in parts.values()), free_bytes(Path(run_dir).absolute())
    if peak <= free:
        return ""
    return (
        f"The disk of {run_dir} is too small: the run takes up to {format_bytes(peak)}, and {format_bytes(free)} are "
        "free. Change first: --trainer.default_root_dir on a larger disk, or --checkpoint.keep_rounds 1."
    )
