"""What a checkpoint says of an epoch that is not finished: it stands after the last update."""

from typing import Any

import lightning as L

Counts = dict[str, int]


def settle(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Take back what a checkpoint counts beyond the last update of its epoch.

    Gradients of an update that was begun are not in checkpoints, so its micro-batches are to come again. And where a
    stop (`should_stop`) left the epoch before its end, Lightning counts the epoch as done. Files that are written after
    an update, or at the end of an epoch, stay as they are.

    Args:
        trainer: Its loader gives the epoch in which it is.
        checkpoint: About to be written; changed in place.
    """
    loop = checkpoint["loops"]["fit_loop"]
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    loaders = [s for s in loop["state_dict"].get("combined_loader", []) if "round" in s]
    if not loaders:
        return
    index, now, total = loaders[0]["round"], batches["current"], trainer.num_training_batches
    last = now["processed"] >= total or batches["is_last_batch"]  # of other sizes, where a run goes on at the very end
    left = epochs["current"]["processed"] == index + 1 and not last
    inside = epochs["current"]["processed"] == index < epochs["current"]["started"]
    done = now["processed"]
    updated = done if last else done - done % trainer.accumulate_grad_batches
    if not left and not (inside and (now["ready"], done) != (updated, updated)):
        return
    for name in ("ready", "started", "processed"):
        _set(batches, name, updated)
    _set(batches, "completed", max(0, updated - 1))  # as after any batch: Lightning then knows where it is
    batches["is_last_batch"] = False
    begun = index + 1 if updated else index
    for name, count in (("ready", begun), ("started", begun), ("processed", index), ("completed", index)):
        _set(epochs, name, count)
    for state in loaders:
        state["batches"] = updated
    steps = checkpoint["global_step"]
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - 1 if updated else steps  # Lightning adds one
    checkpoint["epoch"] = index


def _set(progress: dict[str, Counts], name: str, count: int) -> None:
    """Set a count of the epoch, and take the difference off the run's."""
    progress["total"][name] += count - progress["current"][name]
    progress["current"][name] = count
