"""Dtypes that a device computes in natively."""

import platform
from functools import cache

import torch


@cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16 by instructions of its own.

    x86 processors with AVX-512 alone pass torch's own check, but emulate these products, and are 3 to 5 times slower
    than in float32.
    """
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities.get("architecture") == "x86_64":
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    if platform.machine() == "x86_64" and hasattr(torch.cpu, "_is_avx512_bf16_supported"):  # earlier versions of torch
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    check = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return True if check is None else bool(check())


def fast_dtype(name: str | None, device: str) -> str | None:
    """The dtype to compute in, given the requested one.

    Half precision on a CPU without instructions for it is 3 to 10 times slower than float32, which represents all its
    values.

    Args:
        name: The requested dtype; None for that of the checkpoint.
        device: Type of the device, such as `cpu`.
    """
    slow = name is None or name in ("bfloat16", "float16")
    return "float32" if device == "cpu" and slow and not cpu_has_bfloat16() else name


def fast_precision(precision: str, on_gpu: bool) -> str:
    """The Trainer's precision, given the requested one; see `fast_dtype`."""
    return "32-true" if not on_gpu and precision.endswith("16-mixed") and not cpu_has_bfloat16() else precision


def describe_precision(requested: str, used: str | None) -> str:
    """A sentence if a CPU computes in another precision than the requested one, otherwise empty."""
    if used in (None, requested):
        return ""
    return (
        f"This CPU has no bfloat16 instructions: computing in float32, which is several times faster here "
        f"than {requested}."
    )
