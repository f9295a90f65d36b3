"""How an epoch goes on from its middle when its updates are divided into other micro-batches, or over other ranks."""

from typing import Any

import lightning as L

from rlhf_pl.checkpointing.unfinished_epoch import settle
from rlhf_pl.data.base_datamodule import PairsDataModule
from rlhf_pl.utils.errors import InputError

_KEY = "rlhf_pl_split"


def _split_of(trainer: L.Trainer) -> dict[str, int] | None:
    data = getattr(trainer, "datamodule", None)
    batch_size = getattr(data, "batch_size", None)
    if batch_size is None:
        return None
    accumulate = trainer.accumulate_grad_batches
    rows = batch_size * accumulate * trainer.world_size
    if isinstance(data, PairsDataModule):  # divides updates by tokens, maybe
        rows = data.pairs_per_update(trainer)
    return {"accumulate": accumulate, "rows_per_update": rows}


def note_split(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Write into a checkpoint what its batch counts mean, and let them end at the last update."""
    settle(trainer, checkpoint)
    if (split := _split_of(trainer)) is not None:
        checkpoint[_KEY] = split


def adapt_split(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Turn a checkpoint's batch counts, which are micro-batches of a rank, into those of this run.

    Raises:
        InputError: The epoch can't go on there with updates of another size.
    """
    before = checkpoint.get(_KEY)
    loop = checkpoint["loops"]["fit_loop"]
    epochs = loop["epoch_progress"]["current"]
    progress = loop["epoch_loop.batch_progress"]
    if before is None or epochs["started"] == epochs["processed"] or progress["is_last_batch"]:
        return
    data: Any = getattr(trainer, "datamodule", None)
    if isinstance(data, PairsDataModule) and (data.max_tokens_per_batch is not None or getattr(data, "passes", 1) > 1):
        data.accumulate_over(data.divide(epochs["processed"]))  # an update's micro-batches depend on the epoch
    now = _split_of(trainer)
    if now is None or before == now:
        return
    done = progress["current"]["processed"]
    rows, rest = divmod(done * before["rows_per_update"], before["accumulate"])
    if rest or done % before["accumulate"] or rows % now["rows_per_update"]:
        raise InputError(
            f"The checkpoint stands in the middle of an epoch of {before['rows_per_update']} pairs or rows per update, "
            f"and this run has {now['rows_per_update']} (`data.batch_size` x `trainer.accumulate_grad_batches` x "
            "devices). Keep their product, or resume from a checkpoint after a round."
        )
    batches = rows // now["rows_per_update"] * now["accumulate"]
    for counts in (progress["current"], progress["total"]):
        for name in counts:
            counts[name] += batches - done
    for state in loop["state_dict"].get("combined_loader", []):
        state["batches"] = batches
