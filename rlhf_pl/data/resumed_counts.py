"""Converts the batch counts of a checkpoint if the run now has other micro-batches per update, or other ranks."""

from typing import Any

import lightning as L

from rlhf_pl.checkpointing.unfinished_epoch import rewind_to_last_update
from rlhf_pl.data.pairs_datamodule import PairsDataModule
from rlhf_pl.utils.errors import InputError

_KEY = "rlhf_pl_split"


def _get_update_size(trainer: L.Trainer) -> dict[str, int] | None:
    data = getattr(trainer, "datamodule", None)
    batch_size = getattr(data, "batch_size", None)
    if batch_size is None:
        return None
    accumulate = trainer.accumulate_grad_batches
    rows = batch_size * accumulate * trainer.world_size
    if isinstance(data, PairsDataModule):  # may divide updates by tokens
        rows = data.pairs_per_update(trainer)
    return {"accumulate": accumulate, "rows_per_update": rows}


def record_update_size(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Set a checkpoint's batch counts back to the last update, and save the size of an update with them."""
    rewind_to_last_update(trainer, checkpoint)
    if (size := _get_update_size(trainer)) is not None:
        checkpoint[_KEY] = size


def convert_batch_counts(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Convert a checkpoint's batch counts, which are micro-batches of a rank, to the micro-batches of this run.

    Raises:
        InputError: The epoch can't continue at this point with updates of another size.
    """
    before = checkpoint.get(_KEY)
    loop = checkpoint["loops"]["fit_loop"]
    epochs = loop["epoch_progress"]["current"]
    progress = loop["epoch_loop.batch_progress"]
    if before is None or epochs["started"] == epochs["processed"] or progress["is_last_batch"]:
        return
    data: Any = getattr(trainer, "datamodule", None)
    if isinstance(data, PairsDataModule) and data.has_varying_updates:
        data.accumulate_over(data.divide(epochs["processed"]))  # an update's micro-batches depend on the epoch
    now = _get_update_size(trainer)
    if now is None or before == now:
        return
    done = progress["current"]["processed"]
    rows, rest = divmod(done * before["rows_per_update"], before["accumulate"])
    if rest or done % before["accumulate"] or rows % now["rows_per_update"]:
        raise InputError(
            f"The checkpoint is in the middle of an epoch of {before['rows_per_update']} pairs or rows per update, "
            f"and this run has {now['rows_per_update']} (`data.batch_size` x `trainer.accumulate_grad_batches` x "
            "devices). Keep their product, or resume from a checkpoint after a round."
        )
    batches = rows // now["rows_per_update"] * now["accumulate"]
    for counts in (progress["current"], progress["total"]):
        for name in counts:
            counts[name] += batches - done
    for state in loop["state_dict"].get("combined_loader", []):
        state["batches"] = batches
