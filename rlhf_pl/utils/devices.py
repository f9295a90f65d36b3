"""Which dtypes a device computes in natively."""

from functools import cache

import torch


@cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16, or for the fast conversion that libraries emulate them with."""
    check = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return True if check is None else bool(check())


def fast_dtype(name: str | None, device: str) -> str | None:
    """The dtype to compute in where `name` was asked for; None is that of a checkpoint.

    Without instructions for it half precision on a CPU is ten times slower than float32, which holds all its values.
    """
    slow = name is None or name in ("bfloat16", "float16")
    return "float32" if device == "cpu" and slow and not cpu_has_bfloat16() else name


def fast_precision(precision: str, on_gpu: bool) -> str:
    """The Trainer's precision where `precision` was asked for, by the same rule."""
    return "32-true" if not on_gpu and precision.endswith("16-mixed") and not cpu_has_bfloat16() else precision
