"""How well scores agree with people's preferences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairMetrics:
    """Of the pairs with a preference.

    Args:
        pairs: Their number.
        accuracy: Share in which the chosen answer scores higher; equal scores count half.
        equal: Pairs with equal scores.
        low: Lower end of the accuracy's 95% interval.
        high: Upper end.
        margin: Mean score of the chosen minus the rejected answer, reward units.
        calibration_error: Mean gap, in ten bins, between how sure sigmoid(margin) is and how often it is right.
        loss: Bradley-Terry loss, nats.
        longer: Share in which the chosen answer is the longer text; equal lengths count half.
    """

    pairs: int
    equal: int
    accuracy: float
    low: float
    high: float
    margin: float
    calibration_error: float
    loss: float
    longer: float


def pair_metrics(margins: Sequence[float], longer: Sequence[float]) -> PairMetrics:
    """Metrics of pairs by their margins (chosen minus rejected score) and by whether the chosen text is longer.

    Args:
        margins: One per pair, reward units; not empty.
        longer: 1, 0.5 or 0 per pair.
    """
    values = torch.tensor(list(margins), dtype=torch.float64)
    accuracy = float((0.5 * (1 + values.sign())).mean())
    low, high = wilson_interval(accuracy, len(values))
    return PairMetrics(
        pairs=len(values),
        equal=int((values == 0).sum()),
        accuracy=accuracy,
        low=low,
        high=high,
        margin=float(values.mean()),
        calibration_error=calibration_error(values.abs().sigmoid(), values > 0),
        loss=float(torch.nn.functional.softplus(-values).mean()),
        longer=sum(longer) / len(longer),
    )


def calibration_error(confidences: Tensor, right: Tensor, bins: int = 10) -> float:
    """Mean gap between how sure a prediction is and how often it is right (ECE, arXiv:1706.04599).

    Args:
        confidences: In [0, 1], shape (N,).
        right: Whether each prediction was right, shape (N,).
        bins: Of equal width; a bin counts by its share of the N.
    """
    place = (confidences * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, confidences.double() - right.double())
    return float(gaps.abs().sum() / len(confidences))


def longer_text(chosen: str, rejected: str) -> float:
    """1 if `chosen` is the longer text, 0.5 for equal lengths, 0 if it is the shorter one."""
    return 0.5 * (1 + (len(chosen) > len(rejected)) - (len(chosen) < len(rejected)))


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share seen in `count` trials (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (centre - spread) / (1 + z * z / count), (centre + spread) / (1 + z * z / count)
