"""`eta: auto`: its formulas, its correction by the KL that was reached, and what is refused."""

import math

import numpy as np
import pytest

from rlhf_pl import RebelLoss
from rlhf_pl.algorithms.auto_eta import FALLBACK
from rlhf_pl.algorithms.round_facts import RoundBefore, RoundFacts
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.fingerprints import describe


def choose(loss: RebelLoss, variance: float = 0.5, rms: float = 4.0, before: RoundBefore | None = None) -> dict:
    return loss.choose(RoundFacts(pairs=3, margin_rms=rms, reward_variance=variance, before=before))


def test_targets_have_the_stated_spread() -> None:
    """Margins with a root mean square of 4 reward units: 2 nats (the default) or 1 nat over 4."""
    assert choose(RebelLoss("auto"))["eta"] == 0.5
    assert choose(RebelLoss("auto", target_spread=1.0))["eta"] == 0.25


def test_the_tilted_policy_has_the_stated_kl() -> None:
    """KL of p_new ~ p exp(eta r), computed from its definition over 6 responses with uneven probabilities."""
    p = np.array([0.3, 0.25, 0.2, 0.1, 0.1, 0.05])
    rewards = np.array([0.0, 1.0, -0.5, 2.0, 0.3, -1.0])
    variance = (p * rewards**2).sum() - (p * rewards).sum() ** 2
    eta = choose(RebelLoss("auto", target_kl=0.01), variance)["eta"]
    new = p * np.exp(eta * rewards)
    new /= new.sum()
    assert (new * np.log(new / p)).sum() == pytest.approx(0.01, rel=0.1)  # terms of order eta^3 are left out


@pytest.mark.parametrize(
    ("kl", "error", "last", "expected"),
    [
        (0.4, None, 1.0, 0.5),  # 4 times the KL: half the eta
        (0.4, 0.1, 1.0, 0.5),
        (0.4, 0.35, 1.0, 1.0),  # 0.1 is within one standard error
        (0.05, 0.0, 1.5, 1.5 * math.sqrt(2)),
        (40.0, 0.1, 1.0, 0.5),  # a round halves it at most
        (-0.1, 0.01, 1.0, 2.0),  # and doubles it at most
        (-0.1, None, 8.0, 10.0),  # and all rounds together change it tenfold
        (40.0, None, 0.15, 0.1),
        (None, None, 1.3, 1.3),
        (math.nan, None, 1.3, 1.3),
    ],
)
def test_the_correction_follows_the_kl_that_was_reached(
    kl: float | None, error: float | None, last: float, expected: float
) -> None:
    before = RoundBefore({"eta": 7.0, "target_kl": 0.1, "correction": last}, kl, error)
    found = choose(RebelLoss("auto", target_kl=0.2), 0.4, before=before)
    assert found["correction"] == pytest.approx(expected)
    assert found["eta"] == pytest.approx(expected * 1.0)  # sqrt(2 x 0.2 / 0.4) = 1


def test_rounds_that_stop_short_reach_the_target_after_some_rounds() -> None:
    """A policy that reaches 3 % of the formula's KL."""
    loss, before, reached = RebelLoss("auto", target_kl=0.1), None, 0.0
    for _ in range(5):
        choice = choose(loss, 0.5, before=before)
        reached = 0.03 * choice["eta"] ** 2 * 0.5 / 2
        before = RoundBefore(choice, reached)
    assert reached == pytest.approx(0.1)


@pytest.mark.parametrize("loss", [RebelLoss("auto"), RebelLoss("auto", target_kl=0.1)], ids=["spread", "kl"])
def test_without_a_margin_eta_stays(loss: RebelLoss) -> None:
    assert choose(loss, 0.0, 0.0)["eta"] == FALLBACK
    kept = choose(loss, 0.0, 0.0, RoundBefore({"eta": 3.0, "correction": 2.0, "target_kl": 0.1}, None))
    assert kept["eta"] == 3.0
    assert "no pair has a reward margin: eta is that of the round before" in kept["kept"]
    assert "no pairs" in loss.choose(RoundFacts(0, 0.0, 0.0))["kept"]
    again = choose(loss, before=RoundBefore(kept, 0.3))
    assert again.get("correction", 2.0) == 2.0  # a round that has chosen nothing is no evidence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("auto", -1.0), "`model.loss.target_spread` must be positive and finite, got -1.0"),
        (("auto", None, 0.0), "`model.loss.target_kl` must be positive"),
        (("auto", None, math.nan), "`model.loss.target_kl` must be positive"),
        (("auto", 1.0, 0.1), "`model.loss.target_spread` and `model.loss.target_kl` exclude each other"),
        ((2.0, 1.0), "`model.loss.target_spread` is 1.0, but `model.loss.eta` is 2.0"),
        ((2.0, None, 0.1), "`model.loss.target_kl` is 0.1, but `model.loss.eta` is 2.0"),
        (("large",), "`model.loss.eta` must be positive and finite, or auto"),
        ((math.inf,), "`model.loss.eta` must be positive"),
    ],
)
def test_wrong_targets_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RebelLoss(*arguments)


def test_what_was_chosen_is_no_setting() -> None:
    loss = RebelLoss("auto", target_kl=0.1)
    with pytest.raises(InputError, match="known once a round is read"):
        loss.current_eta  # noqa: B018
    loss.use({"eta": 0.25, "correction": 2.0})
    assert loss.current_eta == 0.25
    assert describe(loss) == "rlhf_pl.RebelLoss(eta='auto', target_kl=0.1)"
    assert describe(RebelLoss("auto")) == "rlhf_pl.RebelLoss(eta='auto', target_spread=2.0)"
    assert describe(RebelLoss(3.0)) == "rlhf_pl.RebelLoss(eta=3.0)"  # as in manifests of earlier versions
