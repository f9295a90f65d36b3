"""Memory of this process: its size, and the settings of the C allocator and of oneDNN for training on a CPU."""

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # from <malloc.h>
# torch looks its kernels up in its own cache first; oneDNN's takes as much memory again for the same ones
_KERNEL_CACHES = {"LRU_CACHE_CAPACITY": "512", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks for the next step instead of returning them to the system.

    Every training step allocates the same large tensors; new pages for them took a fifth of the step (SmolLM2, 2
    cores). Does nothing if the user has set malloc options in the environment, or if there is no glibc.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "LD_PRELOAD" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_TOP_PAD, 2**26)


def bound_kernel_caches() -> None:
    """Let torch keep fewer of oneDNN's kernels, which it caches for every shape of a bfloat16 product on a CPU.

    Must be called before the first product. The lengths of sequences differ from batch to batch, so the caches fill up:
    to 1.2 GiB with their default of 1024 kernels each, to 0.35 GiB with these. 512 are enough for micro-batches of
    75 sequences; of larger ones, kernels are created again in every layer. Does nothing if the user has set one of the
    variables.
    """
    if not any(name in os.environ for name in (*_KERNEL_CACHES, "DNNL_PRIMITIVE_CACHE_CAPACITY")):
        os.environ.update(_KERNEL_CACHES)


def resident_gib() -> float:
    """Resident memory of this process, GiB; 0 if the system does not report it."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:
        return 0.0
