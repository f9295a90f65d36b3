"""FSDP on CPUs, for tests and for trying a config."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


@contextmanager
def cpu_fsdp() -> Iterator[None]:
    """Context manager that lets torch's FSDP (FSDP1) build full state dicts on CPUs, where it crashes otherwise.

    torch moves a flattened parameter to the CPU and frees the source's storage; on a CPU that is the storage which it
    reads next. The command line uses this context for FSDP on a CPU. In Python, call `Trainer.fit` with a
    `CPUFSDPStrategy` inside of it. It patches a class of torch, and restores the class at the end.
    """
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    before = FlatParamHandle.to_cpu
    FlatParamHandle.to_cpu = _keep_in_place  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        FlatParamHandle.to_cpu = before  # type: ignore[method-assign]


def is_cpu_fsdp_active() -> bool:
    """Whether the context manager `cpu_fsdp` is active."""
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    return FlatParamHandle.to_cpu is _keep_in_place


def _keep_in_place(handle: Any) -> AbstractContextManager[None]:
    return nullcontext()
