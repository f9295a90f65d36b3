"""Agreement of scores with human preferences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairMetrics:
    """Metrics of pairs with a preference.

    Args:
        pairs: Number of pairs.
        equal: Number of pairs with equal scores.
        accuracy: Share of pairs in which the chosen response scores higher; equal scores count half.
        low: Lower bound of the accuracy's 95% interval.
        high: Upper bound of the accuracy's 95% interval.
        margin: Mean score of the chosen minus the rejected response, reward units.
        calibration_error: Mean gap, in ten bins, between the confidence sigmoid(|margin|) and the accuracy.
        loss: Bradley-Terry loss, nats.
        longer: Share of pairs in which the chosen response is the longer text; equal lengths count half.
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
    """Compute the metrics of pairs.

    Args:
        margins: Chosen minus rejected score of each pair, reward units; not empty.
        longer: The result of `longer_text` for each pair.
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


def calibration_error(confidences: Tensor, correct: Tensor, bins: int = 10) -> float:
    """Expected calibration error: mean gap between confidence and accuracy (ECE, arXiv:1706.04599).

    Args:
        confidences: In [0, 1], shape (N,).
        correct: Whether each prediction was correct, shape (N,).
        bins: Number of bins of equal width; each is weighted by its share of the predictions.
    """
    indices = (confidences * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, indices, confidences.double() - correct.double())
    return float(gaps.abs().sum() / len(confidences))


def longer_text(chosen: str, rejected: str) -> float:
    """1 if `chosen` is the longer text, 0.5 if the lengths are equal, 0 if it is the shorter one."""
    return 0.5 * (1 + (len(chosen) > len(rejected)) - (len(chosen) < len(rejected)))


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The confidence interval of a share observed in `count` trials (Wilson 1927); 95% for the default `z`."""
    if count == 0:
        return 0.0, 1.0
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (centre - spread) / (1 + z * z / count), (centre + spread) / (1 + z * z / count)
