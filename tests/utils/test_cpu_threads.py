"""Threads of runs on a CPU: measured beside real busy processes, each case in a process of its own."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import pytest
import torch

from rlhf_pl.callbacks.run_lifecycle import RunLifecycle
from rlhf_pl.utils.cpu_threads import FILE, describe_overload, read_threads, write_threads

CODE = "import sys; from rlhf_pl.utils.cpu_threads import choose_threads; print(*choose_threads(sys.argv[1], {n}))"
needs_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


@contextmanager
def busy_core(core: int) -> Iterator[None]:
    """A process that keeps a core busy."""
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()


def choose(run_dir: Path, before: str = "", processes: int = 1, **environment: str) -> tuple[int, str]:
    """Number and sentence of a new process that may run on two cores."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    start = f"import os; os.sched_setaffinity(0, {set(cores)}); import torch; {before}\n"
    variables = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-c", start + CODE.format(n=processes), str(run_dir)]
    done = subprocess.run(command, env=variables | environment, capture_output=True, text=True, check=True)
    number, _, sentence = done.stdout.strip().partition(" ")
    return int(number), sentence


@needs_cores
def test_busy_core_leaves_one_thread(tmp_path: Path) -> None:
    with busy_core(sorted(os.sched_getaffinity(0))[0]):
        number, sentence = choose(tmp_path)
        assert number == 1
        assert re.search(r"busy: this run computes with 1 thread instead of 2\..*OMP_NUM_THREADS", sentence)
        assert choose(tmp_path, OMP_NUM_THREADS="2") == (2, "")


@needs_cores
def test_resumed_run_keeps_its_threads(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"threads": 1}')
    number, sentence = choose(tmp_path)
    assert number == 1
    assert "began with 1 thread" in sentence
    assert "OMP_NUM_THREADS=2" in sentence
    (tmp_path / FILE).write_text('{"threads": 2}')
    with busy_core(sorted(os.sched_getaffinity(0))[0]):
        assert choose(tmp_path) == (2, "")
    assert choose(tmp_path, processes=2)[0] == 1  # two processes on two cores


def test_written_number_is_read(tmp_path: Path) -> None:
    assert read_threads(tmp_path) is None
    write_threads(tmp_path)
    assert read_threads(tmp_path) == torch.get_num_threads()
    (tmp_path / FILE).write_text('{"threads": "many"}')
    assert read_threads(tmp_path) is None


def test_overload_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = os.cpu_count() or 1
    monkeypatch.setattr(os, "getloadavg", lambda: (float(cores), 0.0, 0.0))
    assert not describe_overload()
    monkeypatch.setattr(os, "getloadavg", lambda: (2.0 * cores + 1, 0.0, 0.0))
    assert f"{2.0 * cores + 1:.1f} threads want to run on {cores} cores" in describe_overload()


def test_a_run_warns_of_overload_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loads = iter([0.0, 1e3, 1e3])
    monkeypatch.setattr(os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    run, trainer = RunLifecycle(), L.Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False)
    capsys.readouterr()
    for is_said in (False, True, False):
        run.warn_of_overload(trainer)
        assert ("overloaded" in capsys.readouterr().out) == is_said
