"""Corrects the counts of an unfinished epoch in a checkpoint to those after its last update."""

from typing import Any

import lightning as L

Counts = dict[str, int]


def rewind_to_last_update(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Set a checkpoint's counts back to the last update of its epoch.

    Checkpoints do not hold the gradients of an unfinished update, so its micro-batches are repeated. If a stop
    (`should_stop`) has left the epoch before its end, Lightning counts the epoch as done, which is corrected too.
    Checkpoints written after an update, or at the end of an epoch, are not changed.

    Args:
        trainer: The Trainer that writes the checkpoint.
        checkpoint: The checkpoint to be written; changed in place.
    """
    loop = checkpoint["loops"]["fit_loop"]
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    loaders = [s for s in loop["state_dict"].get("combined_loader", []) if "round" in s]
    if not loaders:
        return
    index, now, total = loaders[0]["round"], batches["current"], trainer.num_training_batches
    # sizes of batches may differ if a run resumes at the end of an epoch
    is_last = now["processed"] >= total or batches["is_last_batch"]
    has_left = epochs["current"]["processed"] == index + 1 and not is_last
    is_inside = epochs["current"]["processed"] == index < epochs["current"]["started"]
    done = now["processed"]
    updated = done if is_last else done - done % trainer.accumulate_grad_batches
    if not has_left and not (is_inside and (now["ready"], done) != (updated, updated)):
        return
    for name in ("ready", "started", "processed"):
        _set_count(batches, name, updated)
    _set_count(batches, "completed", max(0, updated - 1))  # as after any batch, so that Lightning resumes there
    batches["is_last_batch"] = False
    begun = index + 1 if updated else index
    for name, count in (("ready", begun), ("started", begun), ("processed", index), ("completed", index)):
        _set_count(epochs, name, count)
    for state in loaders:
        state["batches"] = updated
    steps = checkpoint["global_step"]
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - 1 if updated else steps  # Lightning adds one
    checkpoint["epoch"] = index


def _set_count(progress: dict[str, Counts], name: str, count: int) -> None:
    """Set a count of the epoch, and change the run's total by the difference."""
    progress["total"][name] += count - progress["current"][name]
    progress["current"][name] = count
