"""What `RoundRefresh` and `EpochRun` do alike: the run directory's lock, the run's limits, and its end."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from rlhf_pl.checkpointing.progress import is_at_round_end, is_stopping_inside
from rlhf_pl.data.run_limits import report_stop, restore_limits, restore_monitors, stop_at_max_steps, suspend_monitors
from rlhf_pl.distributed.ranks import forget_ranks, ranks_of, report_failure
from rlhf_pl.utils.console import console
from rlhf_pl.utils.cpu_threads import choose_threads, describe_overload, write_threads
from rlhf_pl.utils.kept_files import describe_kept
from rlhf_pl.utils.lock import RunLock


class RunLifecycle(L.Callback):
    """Locks the run directory and applies the run's limits, which a subclass takes over in `setup`.

    Attributes:
        first_lines: Printed once the run's checks have passed.
    """

    epoch_name = "epoch"  # what messages call an epoch of the Trainer
    first_lines: Sequence[str] = ()

    def __init__(self) -> None:
        self._lock: RunLock | None = None
        self._threads_before: int | None = None  # of torch, in a run on a CPU
        self._has_warned = False  # of overload

    def choose_threads(self, trainer: L.Trainer) -> None:
        """Let a run on a CPU compute with as many threads as there are free cores; before an engine takes torch's."""
        if not _is_on_cpu(trainer):
            return
        ranks, run_dir = ranks_of(trainer), trainer.default_root_dir
        threads, sentence = ranks.run_on_rank_zero(
            lambda: choose_threads(run_dir, trainer.world_size // trainer.num_nodes)
        )
        self._threads_before = torch.get_num_threads()
        if threads != self._threads_before:
            torch.set_num_threads(threads)
        if sentence:
            self.first_lines = [*self.first_lines, sentence]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lock the run directory: from here on only this process writes to it."""
        self._lock = RunLock(trainer.default_root_dir)
        ranks_of(trainer).run_on_rank_zero(self._lock.acquire)
        if _is_on_cpu(trainer) and trainer.is_global_zero:
            write_threads(trainer.default_root_dir)
        if trainer.is_global_zero:
            for line in self.first_lines:
                console.print(line, soft_wrap=True)
        self.first_lines = ()

    def warn_of_overload(self, trainer: L.Trainer) -> None:
        """Say on rank 0, once, that other jobs slow down a run on a CPU."""
        if self._has_warned or not _is_on_cpu(trainer) or not trainer.is_global_zero:
            return
        if sentence := describe_overload():
            console.print(sentence, soft_wrap=True)
            self._has_warned = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not is_at_round_end(trainer):
            stop_at_max_steps(trainer)  # a resumed run may have reached them

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stop_at_max_steps(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_stopping_inside(trainer):
            suspend_monitors(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        restore_monitors(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        report_stop(trainer, self.epoch_name)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.end()
        if stage == "fit":
            self._print_kept(trainer)
        restore_limits(trainer)
        forget_ranks(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        report_failure(trainer, exception)
        self.end()
        restore_limits(trainer)

    def _print_kept(self, trainer: L.Trainer) -> None:
        """Print the size of what the run directory holds, on rank 0."""
        if trainer.is_global_zero and (line := describe_kept(trainer.default_root_dir)):
            console.print(line, soft_wrap=True)

    def end(self) -> None:
        """Release the run directory; a subclass first closes what it holds."""
        if self._threads_before not in (None, torch.get_num_threads()):
            torch.set_num_threads(self._threads_before)
        self._threads_before = None
        if self._lock is not None:
            self._lock.release()


def _is_on_cpu(trainer: L.Trainer) -> bool:
    return trainer.strategy.root_device.type == "cpu"
