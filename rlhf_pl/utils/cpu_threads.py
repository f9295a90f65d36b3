"""Threads of a process that computes on a CPU: as many as there are cores that nothing else uses.

A parallel section waits for its slowest thread. With a thread on every core, one other busy process delays each section
by a whole time slice of the scheduler, and a run becomes many times slower.
"""

import json
import os
import time
from pathlib import Path

import torch

from rlhf_pl.utils.disk import write_atomically

FILE = "cpu_threads.json"  # in the run directory
_SHORTEST, _LONGEST = 0.3, 60.0  # seconds that the load is measured over
# Lightning sets both where it starts several processes, so the user's values are those of the import
_OMP_NUM_THREADS = os.environ.get("OMP_NUM_THREADS")
_TORCH_THREADS = torch.get_num_threads()


def choose_threads(run_dir: str | Path, processes: int) -> tuple[int, str]:
    """Number of threads for each process of a run, and a sentence on it; an empty one where torch's number stays.

    What the user has set stays: OMP_NUM_THREADS, or, in a run of one process, torch's own number. Otherwise a run keeps
    the number that it began with, because sums of another number of threads round differently.

    Args:
        run_dir: Directory of the run.
        processes: Processes of the run on this machine.
    """
    present = torch.get_num_threads()
    if _OMP_NUM_THREADS is not None or (processes == 1 and present != _TORCH_THREADS):
        return present, ""
    cores = len(_own_cores())
    allowed = max(1, min(_TORCH_THREADS, _quota(cores)) // processes)
    if (begun := read_threads(run_dir)) is not None and begun * processes <= cores:
        return begun, "" if begun == allowed else (
            f"This run began with {_threads(begun, processes)} and goes on with that, so that its sums round alike. To "
            f"change it, set OMP_NUM_THREADS={allowed}."
        )
    busy = _busy_cores()
    threads = max(1, min(allowed, round(cores - busy) // processes))
    if threads == allowed:
        return threads, ""
    return threads, (
        f"Other processes keep {busy:.1f} of {cores} cores busy: this run computes with "
        f"{_threads(threads, processes)} instead of {allowed}. To change it, set OMP_NUM_THREADS."
    )


def read_threads(run_dir: str | Path) -> int | None:
    """The number that a run has computed with; None for a new run and an unreadable file."""
    try:
        threads = json.loads((Path(run_dir) / FILE).read_text())["threads"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return threads if type(threads) is int and threads >= 1 else None


def write_threads(run_dir: str | Path) -> None:
    """Store the present number, unless it is stored already."""
    threads = torch.get_num_threads()
    if read_threads(run_dir) != threads:
        text = json.dumps({"threads": threads}) + "\n"
        write_atomically(Path(run_dir) / FILE, lambda file: file.write(text.encode()))


def describe_overload() -> str:
    """A sentence if more threads want to run on this machine than it has cores (mean of a minute), otherwise empty."""
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    load = os.getloadavg()[0]
    if load <= cores + max(0.5, cores / 8):
        return ""
    fewer = f", or start this run again with fewer threads (it has {threads}): OMP_NUM_THREADS=1" if threads > 1 else ""
    return (
        f"This machine is overloaded: {load:.1f} threads want to run on {cores} cores, which can make this run many "
        f"times slower. End other jobs{fewer}."
    )


def _threads(number: int, processes: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}{' a process' if processes > 1 else ''}"


def _own_cores() -> set[int]:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _quota(cores: int) -> int:
    """Cores' worth of time that the container may use (cgroup v2); `cores` without such a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return cores


def _busy_cores() -> float:
    """Cores of this process that other processes keep busy, on average; 0 where Linux's /proc is missing.

    The average is over the time since this module's import, several seconds of a command's start, so that a short load
    is not taken for a lasting one.
    """
    now, begun = _Used(), _IMPORTED
    if now.cores != begun.cores or now.time - begun.time > _LONGEST:
        begun = now
    if not begun.total:
        return 0.0
    time.sleep(max(0.0, _SHORTEST - (time.monotonic() - begun.time)))
    now = _Used()
    share = 1 - (now.idle - begun.idle) / max(1, now.total - begun.total)
    return max(0.0, share * len(now.cores) - (now.own - begun.own) / (now.time - begun.time))


class _Used:
    """The present time, the time that this process has computed for, its cores and their clock ticks."""

    def __init__(self) -> None:
        self.cores = _own_cores()
        self.time, self.own = time.monotonic(), time.process_time()
        self.total, self.idle = _ticks(self.cores)


def _ticks(cores: set[int]) -> tuple[int, int]:
    """Clock ticks of some cores since the machine's start: all, and those without work."""
    total = idle = 0
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return 0, 0
    names = {f"cpu{core}" for core in cores}
    for name, *numbers in (line.split() for line in lines):
        if name in names:
            ticks = [int(number) for number in numbers[:8]]  # user nice system idle iowait irq softirq steal
            total, idle = total + sum(ticks), idle + ticks[3] + ticks[4]
    return total, idle


_IMPORTED = _Used()
