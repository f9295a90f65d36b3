"""Top-p without sorting the vocabulary, which costs as much as half a decoding step of a small model on the CPU."""

import torch
from torch import Tensor

_BUCKETS, _RANGE = 2048, 32.0  # of logits below the highest, nats; the last bucket has no lower end


def nucleus(logits: Tensor, top_p: Tensor) -> Tensor:
    """Leave the fewest of the likeliest tokens that hold `top_p` of the probability; others get -inf, in place.

    Tokens fall into buckets by their logits, and only those of the bucket where the nucleus ends are sorted. The
    result is that of sorting all; which of equally likely tokens are left at the edge is open in both.

    Args:
        logits: Shape (B, V), divided by the temperature, float32.
        top_p: Shape (B,) or (), above 0.

    Returns:
        `logits`.
    """
    below = logits.amax(-1, keepdim=True) - logits
    weights = (-below).exp()
    bucket = (below.mul_(_BUCKETS / _RANGE)).nan_to_num_(nan=_BUCKETS).clamp_(max=_BUCKETS - 1).long()
    mass = weights.new_zeros(len(logits), _BUCKETS).scatter_add_(1, bucket, weights)
    wanted = (top_p * mass.sum(-1))[:, None]
    edge = ((mass.cumsum(-1) - mass < wanted).sum(-1, keepdim=True) - 1).clamp_(min=0)
    kept, at_edge = bucket < edge, bucket == edge
    likelier = (weights * kept).sum(-1, keepdim=True)
    values, ids = weights.masked_fill_(~at_edge, 0).topk(int(at_edge.sum(-1).max()))
    inside = (values > 0) & (likelier + values.cumsum(-1) - values < wanted)
    kept.scatter_(1, ids, inside | kept.gather(1, ids))
    return logits.masked_fill_(~kept, -torch.inf)
