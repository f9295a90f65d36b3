"""A request to stop a run, which waits until the current step is saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn
from weakref import WeakKeyDictionary

import lightning as L

from rlhf_pl.checkpointing.checkpoints import FOLDER


class RunStopped(BaseException):
    """A signal has stopped the run, and its state is on disk. Not an Exception, so that `except Exception` passes it.

    Args:
        signum: Number of the signal.
        message: What was saved, and how to resume.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """Whether a run was asked to stop, and whether it can stop now.

    Args:
        run_dir: The run directory, for the message.

    Attributes:
        signum: Number of the signal; None without a request.
        can_stop: Whether no step is running that has to be finished first.
        saved_at: The update of the newest resume point.
        has_trained: Whether the run has made an update.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self.signum: int | None = None
        self.can_stop = True
        self.saved_at = 0
        self.has_trained = False

    def receive(self, signum: int) -> None:
        """Stop the run, now or after the current step. A second Ctrl-C does not wait.

        Raises:
            RunStopped: The run stops now.
        """
        is_repeated = self.signum == signum == signal.SIGINT
        self.signum = signum
        if self.can_stop or is_repeated:
            self.stop()

    @contextmanager
    def postpone(self) -> Iterator[None]:
        """Make a request wait for the end of this block.

        Raises:
            RunStopped: A request has come in the block, and no outer block makes it wait.
        """
        before, self.can_stop = self.can_stop, False
        yield
        self.can_stop = before
        if before and self.signum is not None:
            self.stop()

    def stop(self) -> NoReturn:
        """End the run.

        Raises:
            RunStopped: Always. The message says what is saved.
        """
        assert self.signum is not None
        name = signal.Signals(self.signum).name
        last = self.run_dir / FOLDER / "last.ckpt"
        if last.exists():
            saved = f"The training up to update {self.saved_at} is in {last.resolve()}"
        elif self.has_trained:
            saved = f"No resume point was written; the sampled responses are in {self.run_dir}"
        else:
            saved = f"Nothing was trained yet; the sampled responses are in {self.run_dir}"
        raise RunStopped(self.signum, f"Stopped by {name}. {saved}. Run the same command again to resume.")


_REQUESTS: WeakKeyDictionary[L.Trainer, StopRequest] = WeakKeyDictionary()


def get_stop_request(trainer: L.Trainer) -> StopRequest:
    """The StopRequest of a Trainer's run."""
    return _REQUESTS.setdefault(trainer, StopRequest(trainer.default_root_dir))


def clear_stop_request(trainer: L.Trainer) -> None:
    """Remove the request at the end of a run: the Trainer's next run starts without one."""
    _REQUESTS.pop(trainer, None)
