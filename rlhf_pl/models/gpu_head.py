"""Log-probs by an output head on GPUs: logits are never rounded to half precision, and never held for many tokens."""

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from rlhf_pl.models.logprobs import Head, product
from rlhf_pl.utils.console import note

_BLOCK = 4096  # logits that a program looks at together


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run on a device, and are as exact there as a plain head in the same dtype.

    Triton's interpreter runs them on CPUs, for tests.
    """
    on_gpu = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return on_gpu and find_spec("triton") is not None and _what_fails(device, dtype) is None


@cache
def _what_fails(device: torch.device, dtype: torch.dtype) -> str | None:
    """Log-probs and gradients of a small random head, beside those of a plain one, against float64."""
    random = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        drawn = torch.randn(48, 64, generator=random), torch.randn(1000, 64, generator=random) / 2
        factors = torch.randn(48, generator=random).to(device)
        targets = torch.randint(1000, (48,), generator=random).to(device)
    results = []
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for kind in (torch.float64, dtype, None):
                hidden, weight = (t.to(device, dtype).to(kind or dtype).requires_grad_() for t in drawn)
                if kind is None:
                    logps = gpu_logps(hidden, targets, Head(weight), 0.8, 32)
                else:
                    logits = (hidden @ weight.T).to(torch.promote_types(kind, torch.float32)) / 0.8
                    logps = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
                gradients = torch.autograd.grad((logps * factors).sum(), (hidden, weight))
                results.append([t.detach().double() for t in (logps, *gradients)])
    except Exception as error:  # a compiler's or a driver's
        return _said(f"they fail ({type(error).__name__})")
    for exact, plain, found in zip(*results, strict=True):
        allowed, size = (plain - exact).norm(), exact.norm()
        if not (found - exact).norm() <= 1.2 * allowed + 1e-5 * size:
            return _said("their results are less exact than plain ones")
    return None


def _said(why: str) -> str:
    _say(why)
    return why


@rank_zero_only
def _say(why: str) -> None:
    note(f"the output head computes without kernels of its own here: {why}.")


def gpu_logps(hidden: Tensor, targets: Tensor, head: Head, temperature: float, chunk_tokens: int) -> Tensor:
    """What `rlhf_pl.models.logprobs.linear_logps` gives, a chunk of tokens by the whole vocabulary at a time.

    A chunk's logits are computed in float32 from operands in the weight's dtype, read once, and in the backward pass
    computed again and turned into their gradient in one pass.

    Args:
        hidden: Shape (N, H), of the weight's dtype.
        targets: Token ids, shape (N,), int64.
        head: Of V outputs.
        temperature: The sampling temperature, positive.
        chunk_tokens: Tokens whose logits are in memory at a time.

    Returns:
        Shape (N,), float32, nats.
    """
    return _GPULogps.apply(hidden, targets, head.weight, head.bias, head, temperature, chunk_tokens)


class _GPULogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        from rlhf_pl.models import gpu_head_kernels as kernels

        ctx.scale, ctx.softcap, ctx.temperature, ctx.chunk = head.scale, head.softcap, temperature, chunk_tokens
        logps, totals = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = product(hidden[rows], weight.T)
            kernels.forward[(len(logits),)](
                logits, bias, targets[rows], logps[rows], totals[rows], logits.stride(0), logits.shape[1],
                head.scale, head.softcap or 1.0, 1 / temperature, bias is not None, head.softcap is not None, _BLOCK,
            )  # fmt: skip
        ctx.save_for_backward(hidden, targets, weight, bias, totals)
        return logps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(gradient.device.type, enabled=False):
            return _GPULogps._gradients(ctx, gradient.contiguous())

    @staticmethod
    def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from rlhf_pl.models import gpu_head_kernels as kernels

        hidden, targets, weight, bias, totals = ctx.saved_tensors
        wants_hidden, _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        of_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if wants_bias else None
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = product(hidden[rows], weight.T)
            of_logits = torch.empty(logits.shape, dtype=weight.dtype, device=weight.device)
            kernels.backward[(len(logits), -(-logits.shape[1] // _BLOCK))](
                logits, bias, targets[rows], totals[rows], gradient[rows], of_logits, logits.stride(0), logits.shape[1],
                ctx.scale, ctx.softcap or 1.0, 1 / ctx.temperature, bias is not None, ctx.softcap is not None, _BLOCK,
            )  # fmt: skip
            del logits
            if of_hidden is not None:
                of_hidden[rows] = of_logits @ weight
            if of_weight is not None:
                _add_product(of_weight, of_logits.T, hidden[rows])
            if of_bias is not None:
                of_bias += of_logits.sum(0, dtype=torch.float32)
        return (
            of_hidden,
            None,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a float32 sum."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total += product(a, b)
