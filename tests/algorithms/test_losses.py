import numpy as np
import pytest
import torch

from rlhf_pl.algorithms.losses import RebelLoss, rebel_loss
from rlhf_pl.utils.errors import InputError


def test_value_worked_by_hand() -> None:
    """Log-ratios 0.5 and -0.25 have a margin of 0.75; the reward margin is 2, eta is 0.5: (0.75 - 1)^2 = 0.0625."""
    loss = rebel_loss(torch.tensor([0.5]), torch.tensor([-0.25]), torch.tensor([2.0]), eta=0.5)
    assert loss.item() == 0.0625


def test_loss_is_zero_when_margins_match() -> None:
    loss = rebel_loss(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([0.5]), eta=4.0)
    assert loss.item() == 0.0


def test_equals_numpy() -> None:
    generator = np.random.default_rng(0)
    chosen, rejected, margins = generator.normal(size=(3, 64)).astype(np.float32)
    expected = ((chosen - rejected) - 3.0 * margins) ** 2
    actual = RebelLoss(3.0)(*map(torch.tensor, (chosen, rejected, margins)))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6)


def test_descent_raises_the_chosen_and_lowers_the_rejected() -> None:
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    rebel_loss(chosen, rejected, torch.tensor([1.0]), eta=1.0).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() < 0 < rejected.grad.item()


def test_wrong_arguments_are_refused() -> None:
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match="positive"):
        rebel_loss(one, one, one, eta=0.0)
    with pytest.raises(ValueError, match="one shape"):
        rebel_loss(one, one, two, eta=1.0)
    with pytest.raises(InputError, match="eta"):
        RebelLoss(-1.0)
