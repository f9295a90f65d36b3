"""Ranks: the processes of a run, and how they communicate."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import lightning as L
import torch.distributed as dist
from torch import Tensor

from rlhf_pl.distributed.addresses import resolve, seen_from_others
from rlhf_pl.distributed.failure_watch import RankWatch
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.secrets import redact
from rlhf_pl.utils.terminal import MAX_PRINTED, shorten

T = TypeVar("T")
DEFAULT_TIMEOUT = 60.0  # minutes


class RanksError(RuntimeError):
    """A rank has died, or did not arrive in time."""


class Ranks:
    """The processes of a run. With one process every call returns at once.

    All ranks must make the calls that communicate, in the same order. They use a gloo group of their own, on the CPU,
    so they neither block the accelerators nor share their timeout.

    Args:
        rank: This process.
        size: Number of processes.
        timeout: Minutes that a rank waits for the others.
        address: Address of rank 0's host, as the other ranks reach it.
        local: Whether all ranks are on one host.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, timeout: float = DEFAULT_TIMEOUT, address: str = "", local: bool = True
    ) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self._place = ""
        self._group: Any = None
        self._watch: RankWatch | None = None
        if size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout))
            if not local:
                address = seen_from_others(self.all_gather(resolve(address)))
            self._watch = RankWatch(rank, size, self.broadcast, address, local)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes shared files."""
        return self.rank == 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what this rank does, for messages about missing ranks."""
        self._report_phase(name)
        yield
        self._report_phase("")

    def _report_phase(self, place: str) -> None:
        self._place = place
        if self._watch is not None:
            self._watch.report_phase(place)

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        if self.size > 1:
            with self._in_time():
                dist.barrier(group=self._group)

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        return self.all_gather(value)[0] if self.size > 1 else value

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._in_time():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks of a CPU tensor."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        with self._in_time():
            dist.all_reduce(total, group=self._group)
        return total

    def run_on_rank_zero(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 alone. All ranks return its result, or raise its InputError."""
        if self.size == 1:
            return action()
        result: Any = None
        error: InputError | None = None
        if self.is_first:
            try:
                result = action()
            except InputError as problem:
                error = problem
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if time.monotonic() - started < 0.9 * 60 * self.timeout:
                time.sleep(10)  # a rank has died: the failure watch ends this process with a message
                raise RanksError(f"Rank {self.rank} has lost contact with the other ranks{self._where()}.") from error
            places = {} if self._watch is None else self._watch.places
            others = ", ".join(
                f"rank {r} is at {places[r] or 'another phase'!r}" for r in sorted(places) if r != self.rank
            )
            raise RanksError(
                f"Rank {self.rank} waited {self.timeout:g} minutes for the others{self._where()}"
                + (f"; {others}" if others else "")
                + ". If that is how long the phase may take, raise `rollout.timeout_minutes`; otherwise a rank hangs."
            ) from error

    def _where(self) -> str:
        return f" in the phase {self._place!r}" if self._place else ""

    def fail(self, message: str, code: int = 1) -> None:
        """Report to the other ranks why this one ends."""
        if self._watch is not None:
            self._watch.fail(message, code)

    def close(self) -> None:
        """End the failure watch: the run is over."""
        if self._watch is not None:
            self._watch.close()


_OF_TRAINERS: WeakKeyDictionary[L.Trainer, Ranks] = WeakKeyDictionary()


def ranks_of(trainer: L.Trainer, timeout: float | None = None) -> Ranks:
    """The ranks of a Trainer's run. All of them must make the first call, once the strategy has set up the processes.

    Args:
        trainer: Its strategy has set up the processes.
        timeout: Minutes to wait; only the first call's counts.
    """
    found = _OF_TRAINERS.get(trainer)
    if found is None:
        if trainer.world_size == 1:
            found = Ranks()
        else:
            if not dist.is_initialized() or dist.get_world_size() != trainer.world_size:
                raise RanksError(
                    f"The run has {trainer.world_size} ranks, but its process group has "
                    f"{dist.get_world_size() if dist.is_initialized() else 0}: they would train separately."
                )
            environment: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
            found = Ranks(
                trainer.global_rank,
                trainer.world_size,
                DEFAULT_TIMEOUT if timeout is None else timeout,
                environment.main_address,
                trainer.num_nodes == 1,
            )
        _OF_TRAINERS[trainer] = found
    return found


def report_failure(trainer: L.Trainer, error: BaseException) -> None:
    """Report to the other ranks why this one ends. Rank 0 prints it, unless it fails in the same way itself."""
    found = _OF_TRAINERS.get(trainer)
    if found is None or found.size == 1:
        return
    lines = str(error).strip().splitlines() or [""]
    known = isinstance(error, InputError | RanksError) or hasattr(error, "signum")
    message = "\n".join(lines) if known else f"{type(error).__name__}: {lines[-1]}"
    found.fail(shorten(redact(message), MAX_PRINTED - 100), 128 + error.signum if hasattr(error, "signum") else 1)
    if known and found.rank > 0:
        error.reported = True  # type: ignore[attr-defined]


def forget_ranks(trainer: L.Trainer) -> None:
    """End the ranks of a finished run, so that the Trainer's next run gets new ones."""
    found = _OF_TRAINERS.pop(trainer, None)
    if found is not None:
        found.close()
