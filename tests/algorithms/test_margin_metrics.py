"""Slope, quantiles and gradient shares of pairs: values by hand, NumPy, and gradients of naive losses."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_pl import ChosenNLL, IPOLoss, KTOLoss, PairwiseLoss, PromptGroups, RebelLoss, SumOfLosses
from rlhf_pl.algorithms.loss_terms import term_losses
from rlhf_pl.algorithms.margin_metrics import (
    fit_through_origin,
    margin_metric_names,
    margin_metrics,
    pair_columns,
    summarise_margins,
)
from rlhf_pl.algorithms.policy_loss import check_needs
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.modules.pair_margins import PairMargins


class Logistic(PairwiseLoss):
    """Not a regression, and not a function of the margin alone."""

    def __call__(self, chosen_logratios: Tensor, rejected_logratios: Tensor, reward_margins: Tensor) -> Tensor:
        margins = chosen_logratios - rejected_logratios
        return -torch.nn.functional.logsigmoid(margins) + 0.1 * chosen_logratios**2


def make_groups(pairs: int, seed: int = 0, pair_rows: Tensor | None = None, sizes: Any = None) -> PromptGroups:
    """Pairs of their own responses; or, with `pair_rows`, pairs of shared ones, `sizes` of them in each group."""
    generator = torch.Generator().manual_seed(seed)
    count = 2 * pairs if pair_rows is None else int(pair_rows.max()) + 1
    logps, old, rewards = (torch.randn(count, generator=generator) for _ in range(3))
    groups = 2 * torch.ones(pairs, dtype=torch.long) if pair_rows is None else torch.tensor([count])
    return PromptGroups(
        logps, logps.requires_grad_(), rewards, torch.ones(count, dtype=torch.long), torch.ones(count).bool(), groups,
        {"old_logps": old}, pair_rows, None if sizes is None else torch.tensor(sizes),
    )  # fmt: skip


def columns_of(loss: PairwiseLoss, groups: PromptGroups) -> Tensor:
    return pair_columns(loss, groups, term_losses(loss, groups))


def test_slope_and_r2_by_hand() -> None:
    """Rewards 1, 2 and log-ratios 3, 1: slope (3 + 2) / 5 = 1, residuals 2 and -1: R^2 = 1 - 5 / 10."""
    x, y, ones = torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 1.0]).double(), torch.ones(2).double()
    assert fit_through_origin(x, y, ones) == {"slope": 1.0, "r2": 0.5}
    assert fit_through_origin(-x, -y, ones) == {"slope": 1.0, "r2": 0.5}  # the order of a pair is arbitrary
    assert fit_through_origin(x, 0 * y, ones) == {"slope": 0.0}
    assert fit_through_origin(0 * x, y, ones) == {}


def test_equals_numpy_and_the_analytic_gradient() -> None:
    """REBEL's gradient is 2 |log-ratio margin - eta x reward margin|; of 40 pairs the largest 5 % are two."""
    groups = make_groups(40)
    found = margin_metrics(columns_of(RebelLoss(0.7), groups).double())
    ratios = (groups.logps.detach() - groups.old_logps).double().numpy().reshape(-1, 2) @ [1.0, -1.0]
    rewards = groups.rewards.double().numpy().reshape(-1, 2) @ [1.0, -1.0]
    slope, gradients = (ratios @ rewards) / (rewards @ rewards), np.sort(np.abs(ratios - 0.7 * rewards))
    assert found == {
        "slope": pytest.approx(slope, rel=1e-5),
        "r2": pytest.approx(1 - ((ratios - slope * rewards) ** 2).sum() / (ratios @ ratios), rel=1e-5),
        "reached_p50": pytest.approx(np.quantile(np.abs(ratios), 0.5), rel=1e-5),
        "reached_p95": pytest.approx(np.quantile(np.abs(ratios), 0.95), rel=1e-5),
        "target_p50": pytest.approx(np.quantile(0.7 * np.abs(rewards), 0.5), rel=1e-5),
        "target_p95": pytest.approx(np.quantile(0.7 * np.abs(rewards), 0.95), rel=1e-5),
        "gradient_top5": pytest.approx(gradients[-2:].sum() / gradients.sum(), rel=1e-5),
    }
    loss = RebelLoss(0.7)
    assert set(found) == set(margin_metric_names(loss, check_needs(loss, 0.0)))


def test_the_gradient_is_that_of_any_loss_along_the_margin() -> None:
    """By finite differences: half the margin is added to the chosen log-prob, and taken from the rejected one."""
    groups, loss, step = make_groups(6, seed=1), Logistic(), 1e-3
    columns = columns_of(loss, groups)
    chosen, rejected = groups.pairs(groups.logps.detach() - groups.old_logps).double()
    upper, lower = (loss(chosen + s / 2, rejected - s / 2, chosen) for s in (step, -step))
    torch.testing.assert_close(columns[4].double(), ((upper - lower) / (2 * step)).abs(), rtol=1e-4, atol=1e-5)
    assert columns[2].isnan().all()
    assert "target_p50" not in margin_metrics(columns.double())
    assert "target_p50" not in margin_metric_names(loss, check_needs(loss, 0.0))
    (groups.logps.sum() + sum(term_losses(loss, groups)).sum()).backward()  # type: ignore[union-attr]
    assert groups.logps.grad is not None  # the instruments leave the graph as it was


def test_a_prompt_counts_once_whatever_its_pairs() -> None:
    """Three pairs of one prompt that share responses have a weight of 1/3 each, in the gradient too."""
    rows = torch.tensor([[0, 0, 1], [1, 2, 2]])
    groups = make_groups(3, pair_rows=rows, sizes=[3])
    columns, loss = columns_of(RebelLoss(1.0), groups), RebelLoss(1.0)
    chosen, rejected = groups.pairs(groups.logps.detach() - groups.old_logps)
    margins = columns[1]
    assert columns[3].tolist() == pytest.approx([1 / 3] * 3)
    torch.testing.assert_close(columns[4], 2 * (chosen - rejected - margins).abs() / 3)
    assert loss.targets(margins).equal(columns[2])


def test_nothing_is_logged_that_is_not_defined() -> None:
    assert margin_metrics(torch.zeros(5, 0).double()) == {}
    columns = torch.zeros(5, 3).double()
    columns[3] = 1
    found = margin_metrics(columns)
    assert not {"slope", "r2", "gradient_top5"} & set(found)
    assert not any(math.isnan(value) for value in found.values())


class TwoRanks(Ranks):
    """Stands for two processes."""

    def __init__(self, other: Tensor) -> None:
        super().__init__()
        self.other = other

    def all_gather(self, value: Any) -> list[Any]:
        return [value, self.other]


def test_any_division_gives_the_same_numbers() -> None:
    """One micro-batch, three of uneven sizes, and two ranks; the round is the sum of its updates."""
    columns = columns_of(RebelLoss(1.5), make_groups(21))
    whole, parts, ranks = PairMargins(), PairMargins(), PairMargins()
    whole.add(columns)
    expected = whole.compute_and_reset("train", Ranks())
    for part in (columns[:, :2], columns[:, 2:13], columns[:, 13:]):
        parts.add(part)
    assert parts.compute_and_reset("train", Ranks()) == pytest.approx(expected, rel=1e-12)
    ranks.add(columns[:, :7])
    assert ranks.compute_and_reset("train", TwoRanks(columns[:, 7:])) == pytest.approx(expected, rel=1e-12)
    whole.add(columns)
    whole.compute_and_reset("train", Ranks())
    resumed = PairMargins()
    resumed.start_round(whole.of_round())
    assert resumed.summary() == whole.summary()
    assert whole.summary()["slope"] == pytest.approx(expected["train/slope"])
    assert whole.summary()["reached"] == pytest.approx(expected["train/slope"] / 1.5, rel=1e-6)


def test_bins_show_targets_against_log_ratios() -> None:
    """20 pairs with targets 1 to 20 in four bins; log-ratios are half of them."""
    targets = torch.arange(1.0, 21).double()
    columns = torch.stack([targets / 2, targets, targets, torch.ones(20), torch.ones(20)])
    bins = summarise_margins(columns)["bins"]
    assert bins["target"] == [3, 8, 13, 18]
    assert bins["mean"] == [1.5, 4, 6.5, 9]
    assert bins["p90"] == pytest.approx([2.3, 4.8, 7.3, 9.8])


def test_mixtures_of_losses_on_responses_and_chosen_tokens_have_no_share_of_gradients() -> None:
    """KTO with the NLL of chosen responses trains on pairs, but no term gives a value per pair."""
    groups = replace(make_groups(4), stored={"reference_logps": torch.zeros(8), "kto_z_ref": torch.zeros(())})
    loss = SumOfLosses([KTOLoss(), ChosenNLL()])
    columns = pair_columns(loss, groups, term_losses(loss, groups)).double()
    assert "gradient_top5" not in margin_metrics(columns)
    assert set(margin_metric_names(loss, loss.needs)) == {"slope", "r2", "reached_p50", "reached_p95"}


def test_ipo_has_a_share_of_gradients() -> None:
    """By hand: |2 (margin - 5)| / length, for margins 1, 0 of responses of one token: 8 and 10."""
    logps = torch.tensor([1.0, 0.0, 0.0, 0.0], requires_grad=True)
    groups = replace(make_groups(2), logps=logps, stored={"reference_logps": torch.zeros(4)})
    loss = IPOLoss(tau=0.1)
    metrics = margin_metrics(pair_columns(loss, groups, term_losses(loss, groups)).double())
    assert metrics["gradient_top5"] == pytest.approx(10 / 18)
