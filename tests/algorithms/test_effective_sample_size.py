"""The effective sample size of an update's ratios, as a share of their number."""

import pytest

from rlhf_pl.algorithms.losses import RLOOLoss


@pytest.mark.parametrize(
    ("ratios", "share"),
    [
        ([1.0, 1.0], 1.0),
        ([0.0, 2.0], 0.5),  # one of two responses has all the weight
        ([0.0, 0.0], 0.0),  # a policy far from pi_old: the ratios underflow
    ],
)
def test_effective_sample_size(ratios: list[float], share: float) -> None:
    """(sum of ratios)^2 / (n * sum of squares): (0 + 2)^2 / (2 * 4) = 0.5."""
    shifts = [ratio - 1 for ratio in ratios]
    means = {"ratio_shift": sum(shifts) / 2, "ratio_shift_square": sum(shift**2 for shift in shifts) / 2}
    assert RLOOLoss().summarise(means)["ess"] == pytest.approx(share)
