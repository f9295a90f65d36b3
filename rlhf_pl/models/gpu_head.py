"""Log-probs of an output head on GPUs: logits stay in float32, for one chunk of tokens at a time."""

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from rlhf_pl.models.logprobs import Head, product
from rlhf_pl.utils.console import note

_BLOCK = 4096  # logits that a kernel program processes at a time


def has_gpu_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run on a device, and are as exact as a plain head in the same dtype.

    In tests, Triton's interpreter runs them on CPUs.
    """
    on_gpu = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return on_gpu and find_spec("triton") is not None and _find_failure(device, dtype) is None


@cache
def _find_failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compare the kernels' and a plain head's log-probs and gradients to float64, on a small random head.

    Returns the reason if the kernels fail or are less exact, else None.
    """
    random = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        samples = torch.randn(48, 64, generator=random), torch.randn(1000, 64, generator=random) / 2
        factors = torch.randn(48, generator=random).to(device)
        targets = torch.randint(1000, (48,), generator=random).to(device)
    results = []
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for kind in (torch.float64, dtype, None):
                hidden, weight = (t.to(device, dtype).to(kind or dtype).requires_grad_() for t in samples)
                if kind is None:
                    logps = gpu_logps(hidden, targets, Head(weight), 0.8, 32)
                else:
                    logits = (hidden @ weight.T).to(torch.promote_types(kind, torch.float32)) / 0.8
                    logps = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
                gradients = torch.autograd.grad((logps * factors).sum(), (hidden, weight))
                results.append([t.detach().double() for t in (logps, *gradients)])
    except Exception as error:  # compilers and drivers raise errors of any class
        return _report_failure(f"its kernels fail ({type(error).__name__})")
    for exact, plain, found in zip(*results, strict=True):
        allowed, size = (plain - exact).norm(), exact.norm()
        if not (found - exact).norm() <= 1.2 * allowed + 1e-5 * size:
            return _report_failure("its kernels are less exact than plain torch")
    return None


def _report_failure(why: str) -> str:
    _note_failure(why)
    return why


@rank_zero_only
def _note_failure(why: str) -> None:
    note(f"the output head does not use its GPU kernels: {why}.")


def gpu_logps(hidden: Tensor, targets: Tensor, head: Head, temperature: float, chunk_tokens: int) -> Tensor:
    """Like `rlhf_pl.models.logprobs.linear_logps`, in chunks of tokens over the whole vocabulary.

    A chunk's logits are computed in float32 from operands in the weight's dtype and read once. The backward pass
    recomputes them and turns them into their gradient in one pass.

    Args:
        hidden: Shape (N, H), in the weight's dtype.
        targets: Token ids, shape (N,), int64.
        head: A head with V outputs.
        temperature: The sampling temperature, positive.
        chunk_tokens: Tokens per chunk.

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
        logps, log_sum_exps = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = product(hidden[rows], weight.T)
            kernels.forward[(len(logits),)](
                logits, bias, targets[rows], logps[rows], log_sum_exps[rows], logits.stride(0), logits.shape[1],
                head.scale, head.softcap or 1.0, 1 / temperature, bias is not None, head.softcap is not None, _BLOCK,
            )  # fmt: skip
        ctx.save_for_backward(hidden, targets, weight, bias, log_sum_exps)
        return logps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(gradient.device.type, enabled=False):
            return _GPULogps._gradients(ctx, gradient.contiguous())

    @staticmethod
    def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from rlhf_pl.models import gpu_head_kernels as kernels

        hidden, targets, weight, bias, log_sum_exps = ctx.saved_tensors
        needs_hidden, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if needs_bias else None
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = product(hidden[rows], weight.T)
            grad_logits = torch.empty(logits.shape, dtype=weight.dtype, device=weight.device)
            kernels.backward[(len(logits), -(-logits.shape[1] // _BLOCK))](
                logits, bias, targets[rows], log_sum_exps[rows], gradient[rows], grad_logits,
                logits.stride(0), logits.shape[1], ctx.scale, ctx.softcap or 1.0, 1 / ctx.temperature,
                bias is not None, ctx.softcap is not None, _BLOCK,
            )  # fmt: skip
            del logits
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.T, hidden[rows])
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=torch.float32)
        return (
            grad_hidden,
            None,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, float32, in place."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total += product(a, b)
