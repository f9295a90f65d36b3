"""Log-probs of given tokens, without ever holding the logits of all of them."""

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
        softcap: What the logits are squashed to; None for logits as they are (Gemma-2).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, product: Tensor, block: slice = slice(None)) -> Tensor:
        """Logits from products with the weight, computed in place."""
        if self.bias is not None:
            product += self.bias[block]
        if self.scale != 1.0:
            product *= self.scale
        return product if self.softcap is None else product.div_(self.softcap).tanh_().mul_(self.softcap)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, not rounded to the operands' dtype on the way."""
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
    """`gather_logps(head(hidden), targets)`, with at most `chunk_tokens` rows of logits alive at a time, for any head.

    In training the logits of more than one chunk are recomputed in the backward pass, so peak memory is `chunk_tokens`
    times the vocabulary whatever N is.

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
    """`gather_logps` of a head's logits, of which `chunk_tokens` by `VOCABULARY_BLOCK` are alive at most.

    Log-sum-exp is taken block by block; the backward pass computes the logits again and turns them into their gradient
    in place. Nothing is as large as the vocabulary but the weight and its gradient.

    Args:
        hidden: Shape (N, H), of the weight's dtype.
        targets: Token ids, shape (N,), int64.
        head: Of V outputs.
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
        wanted = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        log_total = torch.empty_like(wanted)
        for rows in _slices(len(hidden), chunk_tokens):
            top = wanted.new_full((len(wanted[rows]),), -torch.inf)
            total = torch.zeros_like(top)
            for block in _slices(len(weight), VOCABULARY_BLOCK):
                logits = _block_of_logits(hidden[rows], head, block, temperature)
                place, inside = _places(targets[rows], block)
                wanted[rows] += torch.where(inside, logits.gather(1, place[:, None])[:, 0], 0.0)
                higher = torch.maximum(top, logits.amax(1))
                total = total * (top - higher).exp() + logits.sub_(higher[:, None]).exp_().sum(1)
                top = higher
            log_total[rows] = top + total.log()
        ctx.save_for_backward(hidden, targets, weight, bias, log_total)
        return wanted - log_total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(gradient.device.type, enabled=False):
            return _LinearLogps._gradients(ctx, gradient)

    @staticmethod
    def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, weight, bias, log_total = ctx.saved_tensors
        wants_hidden, _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight) if wants_weight else None
        of_bias = torch.zeros_like(bias) if wants_bias else None
        head = Head(weight, bias, ctx.scale, ctx.softcap)
        scaled = gradient / ctx.temperature
        for rows in _slices(len(hidden), ctx.chunk_tokens):
            h, g = hidden[rows], scaled[rows]
            sums = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
            for block in _slices(len(weight), VOCABULARY_BLOCK):
                logits = _block_of_logits(h, head, block, ctx.temperature)
                slope = _slope(head, logits, ctx.temperature)
                logits.sub_(log_total[rows, None]).exp_().mul_(-g[:, None])  # from here on their gradient
                place, inside = _places(targets[rows], block)
                logits.scatter_add_(1, place[:, None], torch.where(inside, g, 0.0)[:, None])
                of_logits = (logits if slope is None else logits.mul_(slope)).to(weight.dtype)
                if of_hidden is not None:
                    sums += of_logits @ weight[block]
                if of_weight is not None:
                    of_weight[block].addmm_(of_logits.T, h)
                if of_bias is not None:
                    of_bias[block] += of_logits.sum(0)
            if of_hidden is not None:
                of_hidden[rows] = sums
        return of_hidden, None, of_weight, of_bias, None, None, None


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _block_of_logits(hidden: Tensor, head: Head, block: slice, temperature: float) -> Tensor:
    """Logits over the temperature, shape (n, block), float32."""
    logits = head.logits(product(hidden, head.weight[block].T), block)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _slope(head: Head, logits: Tensor, temperature: float) -> Tensor | float | None:
    """Derivative of a head's logits by the products with its weight; None for 1."""
    if head.softcap is None:
        return None if head.scale == 1.0 else head.scale
    return logits.mul(temperature / head.softcap).square_().neg_().add_(1.0).mul_(head.scale)


def _places(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Where in a block the targets are, and whether they are in it, each of shape (n,)."""
    inside = (targets >= block.start) & (targets < block.stop)
    return (targets - block.start).clamp(0, block.stop - block.start - 1), inside
