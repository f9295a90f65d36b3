"""A request to end a run, which waits until what is under way is saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn
from weakref import WeakKeyDictionary

import lightning as L

from rlhf_pl.checkpointing.checkpoints import FOLDER


class RunStopped(BaseException):
    """The process was told to stop, and everything worth keeping is on disk. Not an Exception: nobody may swallow it.

    Args:
        signum: The signal.
        message: What was saved, and how to go on.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """Whether a run was told to stop, and whether it can stop where it is.

    Args:
        run_dir: The run directory, for the message.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self.signum: int | None = None
        self.at_once = True  # nothing is under way that has to be finished first
        self.saved_at = 0  # the update of the newest resume point
        self.has_trained = False

    def receive(self, signum: int) -> None:
        """Stop, now or as soon as what is under way is done; a second Ctrl-C does not wait.

        Raises:
            RunStopped: Nothing has to be waited for.
        """
        again = self.signum == signum == signal.SIGINT
        self.signum = signum
        if self.at_once or again:
            self.carry_out()

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """A part of the run that a request waits for.

        Raises:
            RunStopped: A request came in the meantime, and nothing else has to be waited for.
        """
        before, self.at_once = self.at_once, False
        yield
        self.at_once = before
        if before and self.signum is not None:
            self.carry_out()

    def carry_out(self) -> NoReturn:
        """End the run.

        Raises:
            RunStopped: Says what is saved.
        """
        assert self.signum is not None
        name = signal.Signals(self.signum).name
        last = self.run_dir / FOLDER / "last.ckpt"
        if last.exists():
            saved = f"The training up to update {self.saved_at} is in {last.resolve()}"
        elif self.has_trained:
            saved = f"No resume point was written; what was generated is in {self.run_dir}"
        else:
            saved = f"Nothing was trained yet; what was generated is in {self.run_dir}"
        raise RunStopped(self.signum, f"Stopped by {name}. {saved}. The same command goes on from there.")


_OF_TRAINERS: WeakKeyDictionary[L.Trainer, StopRequest] = WeakKeyDictionary()


def stop_request_of(trainer: L.Trainer) -> StopRequest:
    """The request to end a Trainer's run; one that nobody has made waits for nothing."""
    return _OF_TRAINERS.setdefault(trainer, StopRequest(trainer.default_root_dir))


def forget_stop_request(trainer: L.Trainer) -> None:
    """A run is over: the next one of this Trainer begins without a request."""
    _OF_TRAINERS.pop(trainer, None)
