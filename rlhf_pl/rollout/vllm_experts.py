"""Experts of a vLLM engine on a CPU, which vLLM packs for its kernels when they are first loaded, and only then."""

from typing import Any

Kernels = list[tuple[Any, Any]]


def take_kernels(model: Any) -> Kernels:
    """Take the experts' kernels away, so that their weights are packed anew when they are loaded next.

    vLLM takes a kernel that is there for one whose weights need not be prepared again. That holds for GPUs, where
    graphs keep their addresses; on a CPU weights as they came would be read as packed ones.

    Args:
        model: vLLM's, on a CPU.

    Returns:
        What held a kernel, with that kernel.
    """
    methods: list[Any] = [getattr(module, "quant_method", None) for module in model.modules()]
    held = [(method, method.moe_kernel) for method in methods if getattr(method, "moe_kernel", None) is not None]
    for method, _ in held:
        method.moe_kernel = None
    return held


def check_kernels(held: Kernels, model: Any) -> None:
    """After the weights have been loaded: all experts must have kernels again.

    Raises:
        RuntimeError: vLLM has not loaded the experts of this architecture, and the old kernels are there again.
    """
    if missing := [(method, kernel) for method, kernel in held if method.moe_kernel is None]:
        for method, kernel in missing:
            method.moe_kernel = kernel
        raise RuntimeError(
            f"vLLM takes no new weights for the experts of {type(model).__name__} on a CPU. Use --rollout.sampler "
            "TransformersSampler, or a GPU."
        )
