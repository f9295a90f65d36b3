"""Turns scores into the rewards for pair selection: penalties, then normalisation."""

import math
import random
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_pl.utils.errors import check_at_least, check_finite


@dataclass(frozen=True)
class RewardShaping:
    """Changes scores before pairs are selected. A round's stored rewards stay unshaped.

    Applies the penalties, in reward units, and then the normalisation.

    Args:
        missing_eos_penalty: Subtracted from the reward of responses that were truncated at the length limit.
        missing_eos_reward: Reward of truncated responses, replacing their score; null to keep the score.
        length_penalty: Subtracted for every token over `length_free_tokens`.
        length_free_tokens: Number of response tokens without a penalty.
        normalize: `round` normalises the rewards of the round to mean 0 and standard deviation 1, `prompt` those of
            each prompt; equal rewards become 0. The scale matters: `loss.eta` is in nats per unit of it.
    """

    missing_eos_penalty: float = 0.0
    missing_eos_reward: float | None = None
    length_penalty: float = 0.0
    length_free_tokens: int = 0
    normalize: Literal["none", "round", "prompt"] = "none"

    def __post_init__(self) -> None:
        names = ("missing_eos_penalty", "length_penalty", "length_free_tokens")
        check_at_least("rollout.shaping", **{name: (getattr(self, name), 0) for name in names})
        check_finite("rollout.shaping", missing_eos_reward=self.missing_eos_reward)

    @property
    def penalties(self) -> list[str]:
        """Names of the penalties that are not 0."""
        amounts = {"missing_eos": self.missing_eos_penalty, "length": self.length_penalty}
        return [name for name, amount in amounts.items() if amount > 0]


def shape_rewards(
    groups: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[int]],
    finished: Sequence[Sequence[bool]],
    shaping: RewardShaping,
) -> tuple[list[list[float]], dict[str, Any]]:
    """Shape the rewards of a round.

    Args:
        groups: Scores of each prompt's responses.
        lengths: Number of tokens of each response.
        finished: Whether each response ends with an EOS.
        shaping: The settings.

    Returns:
        (shaped rewards in the same nesting, metrics: the mean of each penalty that is not 0 and, for `round`, the
        round's mean and standard deviation before normalisation).
    """
    shaped, eos_penalties, length_penalties = [], [], []
    for rewards, tokens, flags in zip(groups, lengths, finished, strict=True):
        row = []
        for reward, count, is_finished in zip(rewards, tokens, flags, strict=True):
            if not is_finished and shaping.missing_eos_reward is not None:
                reward = shaping.missing_eos_reward
            eos_penalties.append(0.0 if is_finished else shaping.missing_eos_penalty)
            length_penalties.append(shaping.length_penalty * max(0, count - shaping.length_free_tokens))
            row.append(reward - eos_penalties[-1] - length_penalties[-1])
        shaped.append(row)
    all_rewards = [reward for row in shaped for reward in row]
    count = max(1, len(all_rewards))
    means = {"missing_eos": sum(eos_penalties) / count, "length": sum(length_penalties) / count}
    metrics: dict[str, Any] = {name: means[name] for name in shaping.penalties}
    if shaping.normalize == "round" and all_rewards:
        mean, std = statistics.fmean(all_rewards), statistics.pstdev(all_rewards)
        metrics |= {"round_mean": mean, "round_std": std}
        shaped = [[(r - mean) / std if std > 0 else 0.0 for r in row] for row in shaped]
    elif shaping.normalize == "prompt":
        shaped = [_standardise(row) for row in shaped]
    return shaped, metrics


def break_ties(rewards: Sequence[float], responses: Sequence[Hashable], seed: int) -> list[float]:
    """Break ties at random, by the smallest float64 difference, because a KL term will break them later.

    Args:
        rewards: Rewards of a prompt's responses.
        responses: The responses' tokens, or hashes of them; identical responses stay tied.
        seed: This prompt's seed.
    """
    ranks = list(range(len(rewards)))
    random.Random(seed).shuffle(ranks)
    rank_of = dict(zip(responses, ranks, strict=True))
    untied: list[float] = []
    for reward, tokens in zip(rewards, responses, strict=True):
        for _ in range(rank_of[tokens]):
            reward = math.nextafter(reward, math.inf)
        untied.append(reward)
    return untied


def _standardise(rewards: list[float]) -> list[float]:
    """Normalise to mean 0 and (population) standard deviation 1; equal rewards become 0."""
    if not rewards or max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(r - mean) / std if std > 0 else 0.0 for r in rewards]
