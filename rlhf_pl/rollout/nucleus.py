"""Top-p without sorting the vocabulary, which takes half as long as a decoding step of a small model on the CPU."""

import torch
from torch import Tensor

_BUCKETS, _RANGE = 2048, 32.0  # of logits below the highest, nats; the last bucket has no lower bound


def keep_nucleus(logits: Tensor, top_p: Tensor) -> Tensor:
    """Keep the smallest set of most likely tokens with a total probability of `top_p`; others get -inf, in place.

    Tokens are put into buckets by their logits, and only those of the bucket where the nucleus ends are sorted. The
    result is the same as that of a full sort; in both, ties at the edge are broken arbitrarily.

    Args:
        logits: Logits after division by the temperature, shape (B, V), float32.
        top_p: Probability to keep, above 0, shape (B,) or ().

    Returns:
        `logits` itself.
    """
    below = logits.amax(-1, keepdim=True) - logits
    weights = (-below).exp()
    bucket = (below.mul_(_BUCKETS / _RANGE)).nan_to_num_(nan=_BUCKETS).clamp_(max=_BUCKETS - 1).long()
    mass = weights.new_zeros(len(logits), _BUCKETS).scatter_add_(1, bucket, weights)
    target = (top_p * mass.sum(-1))[:, None]
    edge = ((mass.cumsum(-1) - mass < target).sum(-1, keepdim=True) - 1).clamp_(min=0)
    kept, at_edge = bucket < edge, bucket == edge
    mass_above = (weights * kept).sum(-1, keepdim=True)
    values, ids = weights.masked_fill_(~at_edge, 0).topk(int(at_edge.sum(-1).max()))
    inside = (values > 0) & (mass_above + values.cumsum(-1) - values < target)
    kept.scatter_(1, ids, inside | kept.gather(1, ids))
    return logits.masked_fill_(~kept, -torch.inf)
