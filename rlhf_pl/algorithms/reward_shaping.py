"""From scores to the rewards that pairs are made of: penalties, then normalisation."""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_pl.utils.errors import at_least, finite


@dataclass(frozen=True)
class RewardShaping:
    """What is done to scores before pairs are made; what is stored as a round's rewards stays as it was scored.

    First the penalties, in reward units, then the normalisation.

    Args:
        missing_eos_penalty: Taken off the reward of answers that were cut at the length limit.
        missing_eos_reward: The reward of answers that were cut, whatever their score; null for their score.
        length_penalty: Taken off for every token over `length_free_tokens`.
        length_free_tokens: Answer tokens that cost nothing.
        normalize: `round` gives the round's rewards mean 0 and standard deviation 1, `prompt` those of every prompt;
            answers of equal reward get 0. The scale counts: `loss.eta` is in nats per unit of it.
    """

    missing_eos_penalty: float = 0.0
    missing_eos_reward: float | None = None
    length_penalty: float = 0.0
    length_free_tokens: int = 0
    normalize: Literal["none", "round", "prompt"] = "none"

    def __post_init__(self) -> None:
        names = ("missing_eos_penalty", "length_penalty", "length_free_tokens")
        at_least("rollout.shaping", **{name: (getattr(self, name), 0) for name in names})
        finite("rollout.shaping", missing_eos_reward=self.missing_eos_reward)

    @property
    def penalties(self) -> list[str]:
        """Names of those that are not 0."""
        amounts = {"missing_eos": self.missing_eos_penalty, "length": self.length_penalty}
        return [name for name, amount in amounts.items() if amount > 0]


def shape_rewards(
    groups: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[int]],
    finished: Sequence[Sequence[bool]],
    shaping: RewardShaping,
) -> tuple[list[list[float]], dict[str, Any]]:
    """Shaped rewards, and what to note about them.

    Args:
        groups: Scores of each prompt's answers.
        lengths: Tokens of each answer.
        finished: Whether each ended with an EOS.
        shaping: What to do.

    Returns:
        (rewards in the same nesting, means of the penalties and of the result, and the round's mean and standard
        deviation where it was normalised).
    """
    shaped, for_eos, for_length = [], [], []
    for rewards, tokens, ends in zip(groups, lengths, finished, strict=True):
        row = []
        for reward, count, end in zip(rewards, tokens, ends, strict=True):
            if not end and shaping.missing_eos_reward is not None:
                reward = shaping.missing_eos_reward
            for_eos.append(0.0 if end else shaping.missing_eos_penalty)
            for_length.append(shaping.length_penalty * max(0, count - shaping.length_free_tokens))
            row.append(reward - for_eos[-1] - for_length[-1])
        shaped.append(row)
    everything = [reward for row in shaped for reward in row]
    count = max(1, len(everything))
    means = {"missing_eos": sum(for_eos) / count, "length": sum(for_length) / count}
    notes: dict[str, Any] = {name: means[name] for name in shaping.penalties}
    if shaping.normalize == "round" and everything:
        mean, std = statistics.fmean(everything), statistics.pstdev(everything)
        notes |= {"round_mean": mean, "round_std": std}
        shaped = [[(r - mean) / std if std > 0 else 0.0 for r in row] for row in shaped]
    elif shaping.normalize == "prompt":
        shaped = [_standardised(row) for row in shaped]
    return shaped, notes


def without_ties(rewards: Sequence[float], responses: Sequence[Sequence[int]], seed: int) -> list[float]:
    """Rewards with ties broken by lot, by the least that float64 can tell, where a KL term will break them later.

    Args:
        rewards: Of a prompt's responses.
        responses: Their tokens; equal ones stay equal.
        seed: This prompt's.
    """
    ranks = list(range(len(rewards)))
    random.Random(seed).shuffle(ranks)
    rank_of = {tuple(tokens): rank for tokens, rank in zip(responses, ranks, strict=True)}
    broken: list[float] = []
    for reward, tokens in zip(rewards, responses, strict=True):
        for _ in range(rank_of[tuple(tokens)]):
            reward = math.nextafter(reward, math.inf)
        broken.append(reward)
    return broken


def _standardised(rewards: list[float]) -> list[float]:
    """Mean 0 and (population) standard deviation 1; equal rewards become 0."""
    if not rewards or max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(r - mean) / std if std > 0 else 0.0 for r in rewards]
