"""The DPO family and its relatives: values worked by hand, what moves which way, and options that are refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_pl import (
    APODownLoss,
    APOZeroLoss,
    CPOLoss,
    DPOLoss,
    HingeLoss,
    IPOLoss,
    KTOLoss,
    ORPOLoss,
    RobustDPOLoss,
    SimPOLoss,
    SPPOHardLoss,
    SPPOLoss,
    SumOfLosses,
)
from rlhf_pl.algorithms.apo_losses import apo_down_loss, apo_zero_loss
from rlhf_pl.algorithms.dpo_losses import dpo_loss, hinge_loss, ipo_loss, robust_dpo_loss
from rlhf_pl.algorithms.kto_loss import kto_loss
from rlhf_pl.algorithms.orpo_loss import odds_ratio_loss
from rlhf_pl.algorithms.prompt_groups import PromptGroups
from rlhf_pl.algorithms.reference_free_losses import cpo_loss, simpo_loss
from rlhf_pl.algorithms.sppo_losses import group_win_rates, sppo_loss
from rlhf_pl.utils.errors import InputError

HALF, QUARTER = math.log(0.5), math.log(0.25)
BY_HAND: list[tuple[Callable[..., Tensor], tuple[float, float], dict[str, float], float]] = [
    (dpo_loss, (0.5, -0.5), {"beta": 2.0}, 0.126928),  # margin 2: log(1 + e^-2)
    (dpo_loss, (0.5, -0.5), {"beta": 2.0, "label_smoothing": 0.25}, 0.626928),  # 0.75 * 0.126928 + 0.25 * 2.126928
    (robust_dpo_loss, (0.5, -0.5), {"beta": 2.0, "label_smoothing": 0.25}, -0.873072),  # (0.095196 - 0.531732) / 0.5
    (ipo_loss, (3.0, 1.0), {"tau": 0.1}, 9.0),  # (2 - 5)^2
    (hinge_loss, (2.0, -1.0), {"beta": 0.1}, 0.7),  # 1 - 0.3
    (hinge_loss, (9.0, -2.0), {"beta": 0.1}, 0.0),  # the margin 1.1 is above 1
    (apo_zero_loss, (2.0, -2.0), {"beta": 0.5}, 0.537883),  # 1 - 0.731059 + 0.268941
    (apo_down_loss, (0.0, -2.0), {"beta": 0.5}, 0.768941),  # 0.5 + 1 - 0.731059
    (sppo_loss, (1.0, 0.75), {"beta": 0.1}, 2.25),  # a win rate of 0.75 has the target 0.25 / 0.1
    (simpo_loss, (-1.0, -2.0), {"beta": 2.0, "gamma": 1.0}, 0.313262),  # log(1 + e^-1)
    (cpo_loss, (-10.0, -20.0), {"beta": 0.1}, 0.313262),
    (odds_ratio_loss, (HALF, QUARTER), {}, 0.287682),  # odds 1 and 1/3: -log(3/4)
    (odds_ratio_loss, (QUARTER, HALF), {}, 1.386294),  # -log(1/4)
]


@pytest.mark.parametrize(("loss", "values", "options", "expected"), BY_HAND)
def test_value_worked_by_hand(
    loss: Callable[..., Tensor], values: tuple[float, float], options: dict[str, float], expected: float
) -> None:
    """The second value is that of the rejected response; a win rate for SPPO."""
    first, second = (torch.tensor([value]) for value in values)
    assert loss(first, second, **options).tolist() == [pytest.approx(expected, abs=2e-6)]


def test_kto_worked_by_hand() -> None:
    """Log-ratio 3, z_ref 1, beta 0.5: 1 - sigmoid(1) = 0.268941 and 1 - sigmoid(-1) = 0.731059, the latter doubled."""
    logratios, desirable = torch.tensor([3.0, 3.0]), torch.tensor([True, False])
    losses = kto_loss(logratios, desirable, torch.tensor(1.0), 0.5, desirable_weight=1.0, undesirable_weight=2.0)
    assert losses.tolist() == pytest.approx([0.268941, 1.462117], abs=2e-6)


def test_win_rates_worked_by_hand() -> None:
    """0, 0, log 3: (1/2 + 1/4) / 2 for the first two, 3/4 for the last. In a group of two, 3/4 against 1/4."""
    rewards = torch.tensor([0.0, 0.0, math.log(3), math.log(3), 0.0])
    expected = [0.375, 0.375, 0.75, 0.75, 0.25]
    assert group_win_rates(rewards, torch.tensor([3, 2])).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("loss", "signs"),
    [
        (lambda c, r: dpo_loss(c, r, 0.1, 0.2), (-1, 1)),
        (lambda c, r: robust_dpo_loss(c, r, 0.1, 0.2), (-1, 1)),
        (lambda c, r: ipo_loss(c, r, 0.1), (-1, 1)),
        (lambda c, r: hinge_loss(c, r, 0.1), (-1, 1)),
        (lambda c, r: apo_zero_loss(c, r, 0.1), (-1, 1)),
        (lambda c, r: apo_down_loss(c, r, 0.1), (0, 1)),  # at the reference both forces on the chosen one are equal
        (lambda c, r: simpo_loss(c, r, 2.0, 1.0), (-1, 1)),
        (lambda c, r: cpo_loss(c, r, 0.1), (-1, 1)),
        (lambda c, r: odds_ratio_loss(c - 1, r - 1), (-1, 1)),
    ],
)
def test_descent_raises_the_chosen_and_lowers_the_rejected(
    loss: Callable[[Tensor, Tensor], Tensor], signs: tuple[int, int]
) -> None:
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    loss(chosen, rejected).sum().backward()
    assert (chosen.grad.sign().item(), rejected.grad.sign().item()) == signs  # type: ignore[union-attr]


def test_odds_of_certain_and_impossible_responses_are_finite() -> None:
    """Mean log-probs from 0, where 1 - p is 0, to -200, where p is 0 in float32: against float64, and gradients."""
    logps = torch.tensor([0.0, -1e-9, -1e-4, -0.5, -0.7, -3.0, -200.0], requires_grad=True)
    losses = odds_ratio_loss(logps, torch.full_like(logps, -0.7))
    losses.sum().backward()
    exact = logps.detach().double().clamp(max=-torch.finfo(torch.float32).eps)
    odds = exact - torch.log(-torch.expm1(exact))
    other = torch.tensor(-0.7, dtype=torch.float32).double()
    expected = torch.log1p(torch.exp(-(odds - other + torch.log(-torch.expm1(other)))))
    torch.testing.assert_close(losses.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert logps.grad.isfinite().all()  # type: ignore[union-attr]
    assert (logps.grad[2:] < 0).all()  # type: ignore[index]


def make_groups(rewards: list[float], sizes: list[int], **stored: Tensor) -> PromptGroups:
    """Responses of one token, whose log-probs are 0, -1, -2, ... nats."""
    count = len(rewards)
    logps, ones = -torch.arange(float(count)), torch.ones(count, dtype=torch.int64)
    return PromptGroups(logps, logps, torch.tensor(rewards), ones, ones > 0, torch.tensor(sizes), stored)


def test_kto_labels_responses_by_the_mean_of_their_group() -> None:
    """0.1 three times has a float32 mean that is not 0.1; 2 is the mean of 1, 2, 3."""
    rewards = [0.1, 0.1, 0.1, 1.0, 2.0, 3.0, 5.0, -5.0]
    groups = make_groups(rewards, [3, 3, 2], reference_logps=torch.zeros(8), kto_z_ref=torch.tensor(0.5))
    loss = KTOLoss(beta=0.3, desirable_weight=2.0)
    assert loss.counts_in(groups).tolist() == [0, 0, 0, 1, 0, 1, 1, 1]
    sigmoid = torch.sigmoid(0.3 * torch.tensor([0.5 + 3, -5 - 0.5, -6 - 0.5, 0.5 + 7]))
    expected = (1 - sigmoid) * torch.tensor([1.0, 2.0, 2.0, 1.0])  # undesirable, desirable, desirable, undesirable
    torch.testing.assert_close(loss.losses(groups), expected)


def test_sppo_targets_follow_the_scaled_rewards() -> None:
    """Rewards 0 and 1 at log 3 nats a unit: win rates 1/4 and 3/4, targets -0.25 / 0.5 and 0.25 / 0.5."""
    groups = make_groups([0.0, 1.0], [2], old_logps=torch.tensor([-1.0, -1.0]))  # log-ratios 1 and 0
    losses = SPPOLoss(beta=0.5, reward_scale=math.log(3)).losses(groups)
    assert losses.tolist() == pytest.approx([(1 + 0.5) ** 2, 0.5**2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPOLoss(beta=0.0), "`model.loss.beta` must be positive and finite, got 0.0"),
        (lambda: DPOLoss(beta=math.nan), "`model.loss.beta` must be positive and finite, got nan"),
        (lambda: DPOLoss(label_smoothing=0.5), "`model.loss.label_smoothing` must be at least 0 and below 0.5, got"),
        (lambda: RobustDPOLoss(label_smoothing=-0.1), "`model.loss.label_smoothing`"),
        (lambda: RobustDPOLoss(beta=math.inf), "`model.loss.beta`"),
        (lambda: IPOLoss(tau=-1.0), "`model.loss.tau`"),
        (lambda: HingeLoss(beta=-1.0), "`model.loss.beta`"),
        (lambda: APOZeroLoss(beta=0.0), "`model.loss.beta`"),
        (lambda: APODownLoss(beta=0.0), "`model.loss.beta`"),
        (lambda: KTOLoss(beta=0.0), "`model.loss.beta`"),
        (
            lambda: KTOLoss(desirable_weight=-1.0),
            "`model.loss.desirable_weight` must be 0 or more and finite",
        ),
        (lambda: KTOLoss(undesirable_weight=math.nan), "`model.loss.undesirable_weight`"),
        (lambda: KTOLoss(desirable_weight=0.0, undesirable_weight=0.0), "are both 0"),
        (lambda: SPPOHardLoss(beta=0.0), "`model.loss.beta`"),
        (lambda: SPPOLoss(beta=0.0), "`model.loss.beta`"),
        (lambda: SPPOLoss(reward_scale=0.0), "`model.loss.reward_scale`"),
        (lambda: SimPOLoss(beta=0.0), "`model.loss.beta`"),
        (lambda: SimPOLoss(gamma=-0.5), "`model.loss.gamma`"),
        (lambda: CPOLoss(beta=0.0), "`model.loss.beta`"),
        (lambda: CPOLoss(nll_weight=-1.0), "`model.loss.nll_weight`"),
        (lambda: ORPOLoss(odds_ratio_weight=0.0), "`model.loss.odds_ratio_weight`"),
        (lambda: SumOfLosses([]), "`model.loss.losses` is empty"),
        (lambda: SumOfLosses([DPOLoss()], [1.0, 2.0]), "has 2 numbers, but `model.loss.losses` has 1 losses"),
        (lambda: SumOfLosses([DPOLoss()], [math.nan]), "`model.loss.weights` must be positive and finite"),
        (lambda: SumOfLosses([DPOLoss], [1.0]), "`model.loss.losses` must be PolicyLosses"),  # type: ignore[list-item]
    ],
)
def test_options_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("loss", [row[0] for row in BY_HAND])
def test_arguments_of_different_shapes_are_refused(loss: Callable[..., Tensor]) -> None:
    options = next(row[2] for row in BY_HAND if row[0] is loss)
    with pytest.raises(ValueError, match="one shape"):
        loss(torch.zeros(2), torch.zeros(1), **options)


def test_sums_may_hold_sums_and_losses_with_other_references() -> None:
    loss = SumOfLosses([CPOLoss(nll_weight=0.5), DPOLoss(), SPPOHardLoss()], [2.0, 1.0, 3.0])
    names = [(weight, type(term).__name__) for weight, term in loss.terms]
    assert names == [(2.0, "CPOPreference"), (1.0, "ChosenNLL"), (1.0, "DPOLoss"), (3.0, "SPPOHardLoss")]
    assert loss.needs == {"reference_logps", "old_logps"}
    assert [type(term).__name__ for _, term in CPOLoss(nll_weight=0.0).terms] == ["CPOPreference"]
