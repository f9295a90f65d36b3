"""What an engine inside the trainer's process would change there: environment, temporary files, random state."""

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
    """The variables that vLLM reads when an engine is made; the process has its own back afterwards.

    Args:
        distributed: Whether this process is a rank of a process group.
    """
    own = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine must live in this process to take tensors
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
    }
    if distributed:
        # Lightning leaves RANK unset; the launcher backend makes each rank's engine use its own device.
        own["RANK"] = str(torch.distributed.get_rank())
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def own_temporary_files() -> Iterator[None]:
    """The engine starts with a rendezvous file in the temporary folder, which nobody would remove after a kill.

    It is not needed once the engine runs, so it goes at once; what a process leaves that is killed while it starts, the
    next one removes.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if not Path("/proc", old.name.removeprefix(_PREFIX).split("-")[0]).exists():
            shutil.rmtree(old, ignore_errors=True)
    before = tempfile.tempdir
    tempfile.tempdir = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")
    try:
        yield
    finally:
        shutil.rmtree(tempfile.tempdir, ignore_errors=True)
        tempfile.tempdir = before


@contextlib.contextmanager
def private_rng() -> Iterator[None]:
    """Keep the engine away from the trainer's random state: it seeds Python, NumPy and torch globally."""
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
