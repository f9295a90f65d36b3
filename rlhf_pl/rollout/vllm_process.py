"""Isolates an engine from the trainer's process: environment variables, temporary files, random state."""

import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

_PREFIX = "rlhf_pl-vllm-"


@contextlib.contextmanager
def engine_environment(distributed: bool) -> Iterator[None]:
    """Set the variables that vLLM reads when an engine is created; restores the previous values afterwards.

    Args:
        distributed: Whether this process is a rank of a process group.
    """
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine must run in this process to load tensors from memory
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
    }
    if distributed:
        # Lightning leaves RANK unset; the launcher backend makes each rank's engine use its own device.
        variables["RANK"] = str(torch.distributed.get_rank())
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def private_temporary_folder() -> Iterator[None]:
    """Use a separate temporary folder, for the rendezvous file that an engine creates at its start.

    The file is not needed once the engine runs, so the folder is deleted then; folders of processes that were killed
    during the start are deleted by the next process.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if not Path("/proc", folder.name.removeprefix(_PREFIX).split("-")[0]).exists():
            shutil.rmtree(folder, ignore_errors=True)
    before = tempfile.tempdir
    tempfile.tempdir = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")
    try:
        yield
    finally:
        shutil.rmtree(tempfile.tempdir, ignore_errors=True)
        tempfile.tempdir = before


@contextlib.contextmanager
def private_rng() -> Iterator[None]:
    """Restore the trainer's random state afterwards, as the engine seeds Python, NumPy and torch globally."""
    import numpy as np

    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
