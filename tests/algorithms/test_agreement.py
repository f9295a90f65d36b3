import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from rlhf_pl.algorithms.agreement import calibration_error


def test_calibration_error_by_hand() -> None:
    """0.92 and 0.98 share a bin and are correct once: |1.9 - 1| / 3; 0.55 is correct: 0.45 / 3."""
    found = calibration_error(torch.tensor([0.92, 0.98, 0.55]), torch.tensor([True, False, True]))
    assert found == pytest.approx((0.9 + 0.45) / 3)


def test_calibration_error_equals_torchmetrics() -> None:
    torch.manual_seed(0)
    confidences = torch.rand(500, dtype=torch.float64)
    correct = torch.rand(500) < confidences
    expected = float(binary_calibration_error(confidences, correct.int(), n_bins=10))
    assert calibration_error(confidences, correct) == pytest.approx(expected, rel=1e-6)
