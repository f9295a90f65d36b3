"""Memory of this process: its size, and the C allocator's settings for training on a CPU."""

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # from <malloc.h>


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


def resident_gib() -> float:
    """Resident memory of this process, GiB; 0 if the system does not report it."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:
        return 0.0
