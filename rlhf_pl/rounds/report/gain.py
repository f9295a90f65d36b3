"""Whether the held-out reward has changed by more than noise, and how to say so."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_pl.rounds.report.movement import HARDLY
from rlhf_pl.rounds.report.numbers import decimals_for, is_negligible
from rlhf_pl.rounds.stages import prompt_means
from rlhf_pl.store.round_store import RoundStore

# With n prompts that all gain, chance alone has done as much with probability 2 / 2^n (two-sided): above 5 % for n < 6.
FEWEST = 6
_OPTION = "`data.val_prompts`"
_MOST_PROMPTS = 10_000  # a larger number of prompts is not worth naming


@dataclass(frozen=True)
class Gain:
    """Rewards of held-out prompts under two policies.

    Args:
        before: Mean reward of each prompt under the starting policy, reward units.
        after: The same under the current policy, in the same order.
        prompts: Number of held-out prompts, with those that lack a reward.
    """

    before: Sequence[float]
    after: Sequence[float]
    prompts: int

    @property
    def gains(self) -> list[float]:
        """Gain of each prompt; 0 where it is rounding."""
        pairs = zip(self.before, self.after, strict=True)
        return [0.0 if is_negligible(b - a, a, b) else b - a for a, b in pairs]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.gains)

    @property
    def error(self) -> float:
        """Standard error of the mean over prompts; 0 if all gains are equal, or there is one."""
        gains = self.gains
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
        return 0.0 if is_negligible(error, *self.before, *self.after) else error

    @property
    def noise(self) -> float:
        """The smallest difference that is more than noise: a two-sided test at 5 %, at least two standard errors."""
        return max(2.0, t_quantile(len(self.gains) - 1)) * self.error


def t_quantile(degrees: int, level: float = 0.975) -> float:
    """Quantile of Student's t distribution, within 1 % from 4 degrees of freedom on.

    Source: Abramowitz and Stegun, 26.7.5.
    """
    z = statistics.NormalDist().inv_cdf(level)
    terms = [
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    ]
    return sum(term / max(1, degrees) ** power for power, term in enumerate(terms))


def read_gain(store: RoundStore, version: int) -> Gain:
    """The rewards before the first round and after `version` rounds, of the prompts that have both."""
    before, after = prompt_means(store.held_out(0)), prompt_means(store.held_out(version))
    both = [prompt_id for prompt_id in before if prompt_id in after]
    prompts = int(store.held_out(version).info("responses")["prompts"])
    return Gain([before[i] for i in both], [after[i] for i in both], prompts)


def describe_gain(gain: Gain, kl: float | None = None) -> str:
    """The gain, and what it shows: a claim only where it is more than noise.

    Args:
        gain: The rewards.
        kl: An upper estimate of the KL between the starting and the current policy, nats per response; None if it is
            not known.
    """
    count, unmoved = len(gain.before), kl is not None and kl < HARDLY
    if count == 0:
        return "No held-out prompt has a reward before and after, so there is nothing to compare."
    digits = decimals_for(gain.error or abs(gain.mean))
    means = [statistics.fmean(values) for values in (gain.before, gain.after)]
    text = f"Held-out reward {means[0]:.{digits}f} before, {means[1]:.{digits}f} after"
    if count < gain.prompts:
        text += f" (on the {count} of {gain.prompts} prompts with a reward in both)"
    hardly = f" The policy hardly changed (KL to the start below {HARDLY:g} nats per response over all rounds)"
    if not any(gain.gains):
        equal = len({*gain.before, *gain.after}) == 1
        text += f": all rewards are equal on {_prompts(count)}, so there is nothing to compare." if equal else (
            f": no difference on any of {_prompts(count)}."
        )  # fmt: skip
        return text + (f"{hardly}." if unmoved else "")
    if count < FEWEST:
        text += f" on {_prompts(count)}: too few to tell a difference from chance, whatever its size."
        text += f" {_advise(gain, digits)}"
        return text + (f"{hardly}, so what differs is sampling noise." if unmoved else "")
    shown = f"{gain.mean:+.{digits}f}"
    if gain.error == 0:
        text += f": {shown} on each of {count} prompts."
        return text + (f"{hardly}, so the difference is sampling noise." if unmoved else "")
    ratio = abs(gain.mean) / gain.error
    if ratio * gain.error < gain.noise:
        why = f"{hardly}, so the difference is sampling noise." if unmoved else ""
        return f"{text}: {shown} ± {gain.error:.{digits}f}, within noise.{why} {_advise(gain, digits, unmoved)}"
    text += f": {shown} ± {gain.error:.{digits}f}, {ratio:.1f} standard errors"
    if kl is not None and unmoved and abs(gain.mean) > _largest_gain(gain, kl):
        return f"{text}.{hardly}, so a difference of this size is sampling noise."
    return f"{text}. {_wins(gain.gains)}"


def _largest_gain(gain: Gain, kl: float) -> float:
    """The largest change of the mean reward that a policy at this KL can have, reward units, for a small KL.

    |E_new r - E_old r| <= std(r) sqrt(chi2), and chi2 is 2 KL to leading order. The standard deviation is that of
    prompt means, of both policies.
    """
    return statistics.pstdev([*gain.before, *gain.after]) * math.sqrt(2 * max(kl, 0.0))


def _advise(gain: Gain, digits: int, unmoved: bool = False) -> str:
    """What could be told apart with these prompts, and how many a gain of this size needs."""
    count = len(gain.before)
    if count < FEWEST:
        return f"Raise {_OPTION} (now {gain.prompts}): from 64 on, gains of half a standard deviation can be told."
    needed = math.ceil(count * (gain.noise / abs(gain.mean)) ** 2) if gain.mean else _MOST_PROMPTS + 1
    with_more = f", and about {needed} could tell this one" if needed <= _MOST_PROMPTS and not unmoved else ""
    least = f"{count} held-out prompts can tell a difference of {gain.noise:.{digits}f} or more{with_more}"
    return f"{least}: {_OPTION}."


def _wins(gains: Sequence[float]) -> str:
    """How many prompts have a higher and a lower reward than before."""
    wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    ties = len(gains) - wins - losses
    tied = f", {ties} {'is a tie' if ties == 1 else 'are ties'}" if ties else ""
    return f"The new policy wins on {wins} of {len(gains)} prompts and loses on {losses}{tied}."


def _prompts(count: int) -> str:
    return "1 held-out prompt" if count == 1 else f"{count} held-out prompts"
