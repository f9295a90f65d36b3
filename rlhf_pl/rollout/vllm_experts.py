"""Reloads the experts of a vLLM engine on a CPU, whose weights vLLM packs for its kernels only at the first load."""

from typing import Any

Kernels = list[tuple[Any, Any]]


def detach_kernels(model: Any) -> Kernels:
    """Detach the experts' kernels, so that vLLM packs the experts' weights again at the next load.

    vLLM does not prepare weights again if a kernel exists. That is right for GPUs, where graphs keep the addresses; on
    a CPU the kernel would read unpacked weights as packed ones.

    Args:
        model: vLLM's model, on a CPU.

    Returns:
        Pairs of an object that had a kernel, and that kernel.
    """
    methods: list[Any] = [getattr(module, "quant_method", None) for module in model.modules()]
    detached = [(method, method.moe_kernel) for method in methods if getattr(method, "moe_kernel", None) is not None]
    for method, _ in detached:
        method.moe_kernel = None
    return detached


def check_kernels(detached: Kernels, model: Any) -> None:
    """Check, after the weights have been loaded, that all experts have kernels again.

    Raises:
        RuntimeError: vLLM has not loaded the experts of this architecture; the previous kernels have been restored.
    """
    if missing := [(method, kernel) for method, kernel in detached if method.moe_kernel is None]:
        for method, kernel in missing:
            method.moe_kernel = kernel
        raise RuntimeError(
            f"vLLM can't reload the experts of {type(model).__name__} on a CPU. Use --rollout.sampler "
            "TransformersSampler, or a GPU."
        )
