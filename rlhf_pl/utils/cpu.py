"""What only CPUs need."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


@contextmanager
def cpu_fsdp() -> Iterator[None]:
    """In which torch's FSDP (FSDP1) gives full state dicts on CPUs, where it crashes otherwise.

    torch moves a flattened parameter to the CPU and frees the storage that it came from; on a CPU that is the storage
    which is about to be read. The command line enters it for runs of FSDP on a CPU. In Python it belongs around
    `Trainer.fit` with a `CPUFSDPStrategy`. It changes a class of torch, and puts it back at the end.
    """
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    before = FlatParamHandle.to_cpu
    FlatParamHandle.to_cpu = _stay  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        FlatParamHandle.to_cpu = before  # type: ignore[method-assign]


def runs_fsdp() -> bool:
    """Whether this is inside of `cpu_fsdp`."""
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    return FlatParamHandle.to_cpu is _stay


def _stay(handle: Any) -> AbstractContextManager[None]:
    return nullcontext()
