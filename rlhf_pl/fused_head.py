"""Log-probs by liger-kernel's fused output head, on GPUs where it is installed and gives what plain torch gives."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from rlhf_pl.console import console

# mean differences that rounding explains: nats a token of log-probs, and shares of gradients
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def fused_logps(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
) -> Tensor | None:
    """What `rlhf_pl.logprobs.linear_logps` gives; None without a GPU or liger-kernel, or where its results differ.

    Args:
        hidden: Shape (N, H), of the weight's dtype.
        targets: Token ids, shape (N,), int64.
        weight: Shape (V, H).
        bias: Shape (V,).
        temperature: The sampling temperature, positive.

    Returns:
        Shape (N,), float32, nats.
    """
    # Triton's interpreter runs it on CPUs, for tests
    if not (hidden.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") or len(hidden) == 0:
        return None
    if weight.dtype not in _TOLERANCE or not _is_equal(weight.device, weight.dtype, weight.shape[1]):
        return None
    return _by_liger(hidden, targets, weight, bias, temperature)


def _by_liger(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    if temperature != 1.0:  # of a linear head it may as well divide the states
        hidden = hidden / temperature
        bias = None if bias is None else bias / temperature
    return -liger_fused_linear_cross_entropy(hidden, weight, targets, bias, reduction="none").float()


@cache
def _is_equal(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether log-probs and gradients of a random head are those of plain torch."""
    if find_spec("liger_kernel") is None:
        return False
    from rlhf_pl.logprobs import gather_logps

    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(48, width, generator=random)
    weight = torch.randn(1000, width, generator=random) * 4 * width**-0.5
    factors = torch.randn(48, generator=random).to(device)
    targets = torch.randint(1000, (48,), generator=random).to(device)
    results: list[tuple[Tensor, ...]] = []
    try:
        for fused in (False, True):
            h, w = (t.to(device, dtype).requires_grad_() for t in (hidden, weight))
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                logps = _by_liger(h, targets, w, None, 0.8) if fused else gather_logps(h @ w.T, targets, 0.8)
                results.append((logps.detach(), *torch.autograd.grad(logps, (h, w), factors)))
    except Exception as error:  # a compiler's or a driver's
        _say(f"liger-kernel fails here ({type(error).__name__}: {str(error).splitlines()[0]})")
        return False
    differences = [(a.float() - b.float()).abs().mean() for a, b in zip(*results, strict=True)]
    sizes = [torch.ones((), device=device), *(grad.float().abs().mean() for grad in results[0][1:])]
    worst = max(float(d / size) for d, size in zip(differences, sizes, strict=True))
    if not worst <= _TOLERANCE[dtype]:
        _say(f"liger-kernel's log-probs or gradients are off by {worst:.2g} here")
        return False
    return True


@rank_zero_only
def _say(what: str) -> None:
    console.print(f"[yellow]note[/yellow]: {what}; log-probs are computed without it.", soft_wrap=True)
