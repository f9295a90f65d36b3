"""Experts of a vLLM engine on a CPU, which vLLM packs for its kernels when they are first loaded, and only then."""

from typing import Any


def pack_again(model: Any) -> None:
    """Let the experts' weights be packed anew when they are loaded next.

    vLLM takes a kernel that is there for one whose weights need not be prepared again. That holds for GPUs, where
    graphs keep their addresses; on a CPU weights as they came would be read as packed ones.

    Args:
        model: vLLM's, on a CPU.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None
