"""Log-probabilities of given tokens, without ever holding the logits of all of them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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
    """`gather_logps(head(hidden), targets)`, with at most `chunk_tokens` rows of logits alive at a time.

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
