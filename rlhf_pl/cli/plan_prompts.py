"""The number of prompts of a planned round."""

from pathlib import Path

from rlhf_pl.data import RoundDataModule
from rlhf_pl.data.held_out import default_count


def count_prompts(data: RoundDataModule) -> int | None:
    """Prompts of a round before any are dropped as too long; None if it takes all rows of a data set on the Hub."""
    if data.prompts_per_round is not None:
        return data.prompts_per_round
    if not Path(data.prompts_source).exists():
        return None
    prompts = data._load(data.prompts_source, "data.prompts")
    rows, held_out = len(prompts), data.val_prompts_source
    if held_out is None:
        held_out = default_count(len({prompt.prompt_id for prompt in prompts}))
    if isinstance(held_out, float) and 0 < held_out < 1:
        return rows - max(1, round(rows * held_out))
    return max(1, rows - int(held_out)) if isinstance(held_out, int | float) else rows
