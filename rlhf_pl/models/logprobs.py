"""Log-probs of given tokens, computed in chunks so that the logits of all tokens are never in memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

VOCABULARY_BLOCK = 16_384  # logits of a token that are in memory at a time


@dataclass(frozen=True)
class Head:
    """A linear output head: logits = cap(scale * (hidden @ weight.T + bias)), cap(x) = softcap * tanh(x / softcap).

    Args:
        weight: Shape (V, H).
        bias: Shape (V,).
        scale: Factor on the logits (Cohere, Granite).
        softcap: Bound of the soft-capped logits (Gemma-2); None for no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, product: Tensor, block: slice = slice(None)) -> Tensor:
        """Compute logits in place from the products with the weight."""
        if self.bias is not None:
            product += self.bias[block]
        if self.scale != 1.0:
            product *= self.scale
        return product if self.softcap is None else product.div_(self.softcap).tanh_().mul_(self.softcap)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, without rounding to the operands' dtype."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def gather_logps(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-softmax of `logits / temperature` at `targets`, computed in float32.

    Args:
        logits: Shape (N, V), any float dtype.
        targets: Token ids, shape (N,), int64.
        temperature: The sampling temperature, positive.

    Returns:
        Shape (N,), float32, nats.
    """
    scaled = logits.float() / temperature
    return scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def chunked_logps(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> Tensor:
    """`gather_logps(head(hidden), targets)` for any head, with at most `chunk_tokens` rows of logits in memory.

    With gradients and more than one chunk, the backward pass recomputes the logits, so that peak memory is
    `chunk_tokens` times the vocabulary for any N.

    Args:
        hidden: The hidden state that predicts each target, shape (N, H).
        targets: Token ids, shape (N,), int64.
        head: Maps (n, H) to logits (n, V).
        temperature: The sampling temperature, positive.
        chunk_tokens: Tokens per chunk, positive.

    Returns:
        Shape (N,), float32, nats.
    """

    def one_chunk(h: Tensor, t: Tensor) -> Tensor:
        return gather_logps(head(h), t, temperature)

    recompute = torch.is_grad_enabled() and len(hidden) > chunk_tokens
    parts = []
    for h, t in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        parts.append(checkpoint(one_chunk, h, t, use_reentrant=False) if recompute else one_chunk(h, t))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def linear_logps(
    hidden: Tensor, targets: Tensor, head: Head, temperature: float = 1.0, chunk_tokens: int = 1024
) -> Tensor:
    """`gather_logps` of a head's logits, with at most `chunk_tokens` by `VOCABULARY_BLOCK` logits in memory.

    Log-sum-exp is computed block by block. The backward pass recomputes the logits and turns them into their gradient
    in place. Only the weight and its gradient are as large as the vocabulary.

    Args:
        hidden: Shape (N, H), in the weight's dtype.
        targets: Token ids, shape (N,), int64.
        head: A head with V outputs.
        temperature: The sampling temperature, positive.
        chunk_tokens: Tokens per chunk, positive.

    Returns:
        Shape (N,), float32, nats.
    """
    return _LinearLogps.apply(hidden, targets, head.weight, head.bias, head, temperature, chunk_tokens)


class _LinearLogps(torch.autograd.Function):
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
        ctx.scale, ctx.softcap, ctx.temperature, ctx.chunk_tokens = head.scale, head.softcap, temperature, chunk_tokens
        target_logits = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        log_sum_exp = torch.empty_like(target_logits)
        for rows in _slices(len(hidden), chunk_tokens):
            maximum = target_logits.new_full((len(target_logits[rows]),), -torch.inf)
            total = torch.zeros_like(maximum)
            for block in _slices(len(weight), VOCABULARY_BLOCK):
                logits = _block_of_logits(hidden[rows], head, block, temperature)
                column, in_block = _target_columns(targets[rows], block)
                target_logits[rows] += torch.where(in_block, logits.gather(1, column[:, None])[:, 0], 0.0)
                new_maximum = torch.maximum(maximum, logits.amax(1))
                total = total * (maximum - new_maximum).exp() + logits.sub_(new_maximum[:, None]).exp_().sum(1)
                maximum = new_maximum
            log_sum_exp[rows] = maximum + total.log()
        ctx.save_for_backward(hidden, targets, weight, bias, log_sum_exp)
        return target_logits - log_sum_exp

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(gradient.device.type, enabled=False):
            return _LinearLogps._gradients(ctx, gradient)

    @staticmethod
    def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, weight, bias, log_sum_exp = ctx.saved_tensors
        needs_hidden, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        head = Head(weight, bias, ctx.scale, ctx.softcap)
        scaled = gradient / ctx.temperature
        for rows in _slices(len(hidden), ctx.chunk_tokens):
            h, g = hidden[rows], scaled[rows]
            sums = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
            for block in _slices(len(weight), VOCABULARY_BLOCK):
                logits = _block_of_logits(h, head, block, ctx.temperature)
                slope = _slope(head, logits, ctx.temperature)
                logits.sub_(log_sum_exp[rows, None]).exp_().mul_(-g[:, None])  # now the gradient of the logits
                column, in_block = _target_columns(targets[rows], block)
                logits.scatter_add_(1, column[:, None], torch.where(in_block, g, 0.0)[:, None])
                grad_logits = (logits if slope is None else logits.mul_(slope)).to(weight.dtype)
                if grad_hidden is not None:
                    sums += grad_logits @ weight[block]
                if grad_weight is not None:
                    grad_weight[block].addmm_(grad_logits.T, h)
                if grad_bias is not None:
                    grad_bias[block] += grad_logits.sum(0)
            if grad_hidden is not None:
                grad_hidden[rows] = sums
        return grad_hidden, None, grad_weight, grad_bias, None, None, None


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _block_of_logits(hidden: Tensor, head: Head, block: slice, temperature: float) -> Tensor:
    """Logits divided by the temperature, shape (n, block), float32."""
    logits = head.logits(product(hidden, head.weight[block].T), block)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _slope(head: Head, logits: Tensor, temperature: float) -> Tensor | float | None:
    """Derivative of a head's logits with respect to the products with its weight; None for 1."""
    if head.softcap is None:
        return None if head.scale == 1.0 else head.scale
    return logits.mul(temperature / head.softcap).square_().neg_().add_(1.0).mul_(head.scale)


def _target_columns(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """The targets' columns in a block, and whether each target is in the block, both of shape (n,)."""
    in_block = (targets >= block.start) & (targets < block.stop)
    return (targets - block.start).clamp(0, block.stop - block.start - 1), in_block
