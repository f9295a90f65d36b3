"""A loss says in its own words what its number means, and what to change after a round that hardly moved."""

import re
from pathlib import Path

import pytest
import torch

from rlhf_pl.algorithms import losses
from rlhf_pl.algorithms.kl_estimates import KLTerm
from rlhf_pl.algorithms.losses import (
    APODownLoss,
    APOZeroLoss,
    ChosenNLL,
    CPOLoss,
    DPOLoss,
    HingeLoss,
    IPOLoss,
    KTOLoss,
    ORPOLoss,
    PairwiseLoss,
    PolicyGradientLoss,
    PolicyLoss,
    PPOLoss,
    RebelLoss,
    RobustDPOLoss,
    SimPOLoss,
    SPPOHardLoss,
    SPPOLoss,
    SumOfLosses,
)
from rlhf_pl.algorithms.margin_metrics import margin_metric_names
from rlhf_pl.algorithms.prompt_groups import Z_REF, PromptGroups
from rlhf_pl.algorithms.step_options import describe_smaller_steps
from rlhf_pl.rounds.report.legend import make_legend
from rlhf_pl.rounds.report.movement import describe_standstill
from rlhf_pl.store.round_store import RoundStore

ABSTRACT = {PolicyLoss, PairwiseLoss, PolicyGradientLoss, SumOfLosses}
LOSSES = [kind for name in losses.__all__ if isinstance(kind := getattr(losses, name), type) and kind not in ABSTRACT]


class OwnLoss(PolicyLoss):
    def losses(self, groups: PromptGroups) -> torch.Tensor:
        return groups.logps


class WithWords(OwnLoss):
    meaning = "distance to the goal, metres"
    larger_steps = {"stride": "raise"}  # noqa: RUF012
    stride = 3


@pytest.mark.parametrize("kind", LOSSES, ids=lambda kind: kind.__name__)
def test_every_loss_and_term_says_what_its_number_means(kind: type[PolicyLoss]) -> None:
    loss = kind(constant_tokens=8) if kind is losses.DrGRPOLoss else kind()  # type: ignore[call-arg]
    assert all("mean of " + type(term).__name__ not in term.meaning for _, term in loss.terms)
    assert f"  loss: {loss.meaning}" in make_legend(loss, has_kl=True, held_out=True).splitlines()


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (
            RebelLoss(),
            "  targets reached: slope of the pairs' log-ratio margins on their targets, over all",
        ),
        (DPOLoss(), "  slope: of the pairs' log-ratio margins on their reward margins; R²: the share of"),
        (losses.GRPOLoss(), ""),
    ],
)
def test_the_legend_explains_the_fit_of_the_margins_where_rounds_show_it(loss: PolicyLoss, line: str) -> None:
    legend = make_legend(loss, has_kl=True, held_out=True, margins=margin_metric_names(loss, loss.needs))
    assert line in legend
    assert ("R²" in legend) == bool(line)


@pytest.mark.parametrize(
    "loss",
    [DPOLoss(0.3), RobustDPOLoss(0.3, 0.2), IPOLoss(0.2), HingeLoss(), APOZeroLoss(), APODownLoss(), KTOLoss(0.1, 2, 2),
     SimPOLoss(gamma=0.7), CPOLoss().terms[0][1], ORPOLoss().terms[1][1], SPPOHardLoss(0.01), SPPOLoss(0.01, 1e3)],
    ids=lambda loss: type(loss).__name__,
)  # fmt: skip
def test_the_start_that_a_loss_names_is_its_value_there(loss: PolicyLoss) -> None:
    """Two responses of two tokens, equally likely, under a policy that equals pi_old and the reference."""
    logps, lengths = torch.full((2,), -3.0), torch.full((2,), 2)
    stored = {"old_logps": logps, "reference_logps": logps, Z_REF: torch.tensor(0.0)}
    tokens = torch.full((4,), -1.5)
    groups = PromptGroups(tokens, logps, torch.tensor([1.0, 0.0]), lengths, lengths > 0, torch.tensor([2]), stored)
    value = loss.losses(groups).mean().item()
    named = [float(number.replace(",", "")) for number in re.findall(r"(?<![\w.^])\d[\d,]*(?:\.\d+)?", loss.meaning)]
    assert any(number == pytest.approx(value, abs=6e-4) for number in named), (value, loss.meaning)


def test_a_sum_explains_its_terms_with_their_weights() -> None:
    text = SumOfLosses([SumOfLosses([DPOLoss()], [2.0]), ChosenNLL(), OwnLoss()], [0.5, 0.1, 1.0]).meaning
    assert text.startswith(f"1 x DPOLoss ({DPOLoss().meaning}) + 0.1 x ChosenNLL (")
    assert text.endswith(" + 1 x OwnLoss (mean of OwnLoss over the round's groups)")
    assert "critic" in PPOLoss().meaning


@pytest.mark.parametrize(
    ("loss", "advice"),
    [
        (RebelLoss(0.5), "lower `model.loss.eta` (now 0.5)"),
        (RebelLoss(), "lower `model.loss.target_spread` (now 2)"),
        (RebelLoss(target_kl=3.0), "lower `model.loss.target_kl` (now 3)"),
        (DPOLoss(0.1), "raise `model.loss.beta` (now 0.1)"),
        (losses.GRPOLoss(kl=KLTerm(coef=0.05)), "raise `model.loss.kl.coef` (now 0.05)"),
        (losses.GRPOLoss(), ""),
        (SumOfLosses([HingeLoss(9.0), RebelLoss(2.0)]),
         "raise `beta` of `HingeLoss` (now 9) or lower `eta` of `RebelLoss` (now 2)"),
    ],
)  # fmt: skip
def test_smaller_steps_name_options_that_the_loss_has(loss: PolicyLoss, advice: str) -> None:
    assert describe_smaller_steps(loss) == advice


def standstill(folder: Path, loss: PolicyLoss, target: float | None = None) -> str:
    """What is said after a round of 5 updates at 1e-6 that moved the policy by 1e-5 nats."""
    stored = RoundStore(folder).round(0)
    margins = {} if target is None else {"margins": {"target_p95": target}}
    stored.complete("training", loss=1.0, movement={"updates": 5, "lr": 1e-6, "k2": 1e-5}, **margins)
    return describe_standstill(RoundStore(folder), 0, loss)


@pytest.mark.parametrize(
    ("loss", "target", "advice"),
    [
        (RebelLoss(0.5), 0.01, "below 0.01 nats; raise or set to auto `model.loss.eta` (now 0.5)"),
        (RebelLoss("auto", 0.1), 0.2, "raise `model.loss.target_spread` (now 0.1)"),
        (RebelLoss("auto", target_kl=0.001), 0.2, "raise `model.loss.target_kl` (now 0.001)"),
        (RebelLoss(0.5), 3.0, "the targets are far from reached; raise `--model.optimizer.lr` (now 1e-06)"),
        (DPOLoss(50.0), None, "a log-ratio margin of 0.08 nats; lower `model.loss.beta` (now 50)"),
        (DPOLoss(0.1), None, "per response): raise `--model.optimizer.lr` (now 1e-06), or make more updates ("),
        (SPPOLoss(10.0), None, "lower `model.loss.beta` (now 10) or raise `model.loss.reward_scale` (now 1)"),
        (SumOfLosses([HingeLoss(9.0)]), None, "margin of 0.11 nats; lower `beta` of `HingeLoss` (now 9)"),
        (SumOfLosses([HingeLoss(9.0), ChosenNLL()]), None, "per response): raise `--model.optimizer.lr`"),
        (WithWords(), None, "lower `data.batch_size`; or raise `model.loss.stride` (now 3)"),
    ],
)  # fmt: skip
def test_the_advice_after_a_standstill_is_the_losss_own(
    tmp_path: Path, loss: PolicyLoss, target: float | None, advice: str
) -> None:
    assert advice in standstill(tmp_path, loss, target)


def test_a_fixed_number_of_updates_is_raised_by_its_own_option(tmp_path: Path) -> None:
    """With `data.updates_per_round`, `data.passes` is refused."""
    RoundStore(tmp_path).round(0).update(settings={"training": {"updates_per_round": 5}})
    assert "more updates (5 in this round): raise `data.updates_per_round`" in standstill(tmp_path, RebelLoss(0.5), 3.0)
    assert "data.passes" not in standstill(tmp_path, RebelLoss(0.5), 3.0)
