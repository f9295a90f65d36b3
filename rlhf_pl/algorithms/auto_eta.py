"""Chooses REBEL's eta from a stored round, so that its targets or its KL divergence have a stated size."""

import math
from typing import Literal

from rlhf_pl.algorithms.round_facts import Choice, RoundBefore, RoundFacts
from rlhf_pl.utils.errors import InputError

DEFAULT_SPREAD = 2.0  # nats
FALLBACK = 1.0  # nats per reward unit, where no pair has a margin and no earlier round has chosen
STEP = 2.0  # a round changes the correction by at most this factor
LIMIT = 10.0  # and all rounds together by at most this one
_SMALLEST = 1e-30  # reward units; float32 has no reciprocal of much smaller margins


def check_targets(eta: float | Literal["auto"], target_spread: float | None, target_kl: float | None) -> None:
    """Refuse an eta that is not positive, and targets that have no effect or contradict each other.

    Raises:
        InputError: Names the option of `model.loss`.
    """
    targets = {"target_spread": target_spread, "target_kl": target_kl}
    given = {name: value for name, value in targets.items() if value is not None}
    if eta != "auto" and not (isinstance(eta, float | int) and 0 < eta < math.inf):
        raise InputError(f"`model.loss.eta` must be positive and finite, or auto, got {eta}.")
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise InputError(f"`model.loss.{name}` must be positive and finite, got {value}.")
        if eta != "auto":
            raise InputError(
                f"`model.loss.{name}` is {value}, but `model.loss.eta` is {eta}, so it would have no effect. Set eta "
                "to auto, or leave it out."
            )
    if len(given) > 1:
        raise InputError("`model.loss.target_spread` and `model.loss.target_kl` exclude each other: give one of them.")


def eta_by_spread(facts: RoundFacts, target: float) -> Choice:
    """The eta for which the targets, eta times the reward margins, have a root mean square of `target` nats."""
    if facts.margin_rms < _SMALLEST or not math.isfinite(facts.margin_rms):
        return _keep(facts)
    return {"eta": target / facts.margin_rms, "target_spread": target, "margin_rms": facts.margin_rms}


def eta_by_kl(facts: RoundFacts, target: float) -> Choice:
    """The eta for which the round should reach KL(new || old) = `target` nats per response.

    The regression's solution is pi_new ~ pi_old exp(eta r). By the cumulants of r under pi_old,

        KL(new || old) = eta K'(eta) - K(eta) = eta^2 Var(r) / 2 + O(eta^3),  K(eta) = log E_old exp(eta r),

    with the variance of r over the responses to one prompt, and the mean over prompts. (For pairs of random responses
    the mean square margin is twice that variance; for best against worst of n it is larger.) Training stops short of
    the solution, or generalises beyond the pairs, so eta is multiplied by a correction: that with which the round
    before would have reached its target, if its KL grows with the square of eta.
    """
    variance, correction = facts.reward_variance, _correction(facts.before)
    if variance < _SMALLEST**2 or not math.isfinite(variance):
        return _keep(facts) | {"correction": correction}
    return {
        "eta": correction * math.sqrt(2 * target / variance),
        "target_kl": target,
        "reward_std": math.sqrt(variance),
        "correction": correction,
    }


def _correction(before: RoundBefore | None) -> float:
    """The round before's correction, times the square root of its target over the KL that it has reached."""
    if before is None:
        return 1.0
    last, aimed_at = before.choice.get("correction", 1.0), before.choice.get("target_kl")
    assert isinstance(last, float)
    if not isinstance(aimed_at, float) or before.kl is None or not math.isfinite(before.kl):
        return last
    if abs(before.kl - aimed_at) <= (before.kl_se or 0.0):  # within its standard error
        return last
    factor = math.sqrt(aimed_at / before.kl) if before.kl > 0 else STEP  # an estimate of a small KL may be negative
    return min(LIMIT, max(1 / LIMIT, last * min(STEP, max(1 / STEP, factor))))


def _keep(facts: RoundFacts) -> Choice:
    """The eta of the round before, where the round has no reward difference to choose by."""
    why = "no pair has a reward margin" if facts.pairs else "the round has no pairs"
    before = None if facts.before is None else facts.before.choice.get("eta")
    if before is None:
        return {"eta": FALLBACK, "kept": f"{why}, and no earlier round has chosen eta: {FALLBACK:g} is used"}
    return {"eta": before, "kept": f"{why}: eta is that of the round before"}
