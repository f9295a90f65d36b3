"""Pair selectors: which responses to a prompt become pairs (chosen, rejected)."""

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from rlhf_pl.utils.errors import InputError, check_at_least

Pair = tuple[int, int]


class PairSelector(ABC):
    """Selects pairs of responses to a prompt. Subclass it and name your class in `rollout.selector.class_path`.

    A prompt may get several pairs: each response is then computed once with its prompt, the loss of the prompt is the
    mean over its pairs, and the prompt counts once in an update. The chosen response must not have the lower reward. A
    pair with equal rewards is left out, unless the loss is a regression onto margins, such as `RebelLoss`.
    `RoundRefresh` drops prompts without a pair and counts them. The rewards include penalties and normalisation. Where
    `model.kl_coef` will break ties, the selector sees rewards whose ties are broken at random, by the smallest
    representable difference, so that no prompt is dropped for a tie. This does not apply to round 1 of a run that
    starts at the reference, where the KL term is 0.

    Attributes:
        gives_ties: Whether it may select pairs with equal rewards.
        gives_one_pair: Whether a prompt gets at most one pair; `rlhf-pl plan` uses it.
    """

    gives_ties: ClassVar[bool] = True
    gives_one_pair: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self, rewards: Sequence[float], lengths: Sequence[int], finished: Sequence[bool], seed: int
    ) -> list[Pair]:
        """Pairs of one prompt.

        Args:
            rewards: Reward of each response.
            lengths: Tokens of each response.
            finished: Whether each response ended with an EOS.
            seed: This prompt's seed, for selectors that choose at random.

        Returns:
            (chosen index, rejected index) for each pair; empty to drop the prompt.
        """


class BestWorst(PairSelector):
    """The best against the worst response; among equal ones the first.

    Args:
        min_margin: Prompts whose best and worst reward differ by at most this much are dropped, in reward units.
    """

    gives_ties = False
    gives_one_pair = True

    def __init__(self, min_margin: float = 0.0) -> None:
        check_at_least("rollout.selector", min_margin=(min_margin, 0))
        self.min_margin = min_margin

    def __call__(
        self, rewards: Sequence[float], lengths: Sequence[int], finished: Sequence[bool], seed: int
    ) -> list[Pair]:
        best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
        return [(best, worst)] if _exceeds(rewards[best] - rewards[worst], self.min_margin) else []


class RandomPair(PairSelector):
    """Two responses at random, the better one chosen; uniform over all pairs of different rewards.

    Unlike best against worst, the pair is an unbiased sample of the policy, as in the REBEL paper's online runs.
    """

    gives_ties = False
    gives_one_pair = True

    def __call__(
        self, rewards: Sequence[float], lengths: Sequence[int], finished: Sequence[bool], seed: int
    ) -> list[Pair]:
        pairs = [(i, j) for i in range(len(rewards)) for j in range(len(rewards)) if rewards[i] > rewards[j]]
        return [random.Random(seed).choice(pairs)] if pairs else []


class AllPairs(PairSelector):
    """All pairs of a prompt's responses, so that each response that was paid for reaches the gradient.

    With REBEL, the sum over the pairs of n responses of (d_i - d_j)^2, with d_i = log-ratio - eta x reward, is n times
    the sum of (d_i - mean d)^2, and the mean over the pairs has the gradient of RLOO before the first update, times
    4 eta. Pairs of equal rewards belong to that sum; a loss that is not a regression onto margins leaves them out. A
    prompt counts once, whatever its number of responses. A prompt whose rewards are all equal is dropped.

    Args:
        min_margin: Pairs whose rewards differ by at most this much are left out, in reward units; with 0, pairs of
            equal rewards stay.
        max_pairs: Maximum number of pairs of a prompt, chosen at random; null for all.
    """

    def __init__(self, min_margin: float = 0.0, max_pairs: int | None = None) -> None:
        check_at_least("rollout.selector", min_margin=(min_margin, 0), max_pairs=(max_pairs, 1))
        self.min_margin, self.max_pairs = min_margin, max_pairs

    def __call__(
        self, rewards: Sequence[float], lengths: Sequence[int], finished: Sequence[bool], seed: int
    ) -> list[Pair]:
        pairs = [
            (i, j) if rewards[i] >= rewards[j] else (j, i)
            for i, j in itertools.combinations(range(len(rewards)), 2)
            if self.min_margin == 0 or _exceeds(abs(rewards[i] - rewards[j]), self.min_margin)
        ]
        if self.max_pairs is not None and len(pairs) > self.max_pairs:
            kept = random.Random(seed).sample(range(len(pairs)), self.max_pairs)
            pairs = [pairs[i] for i in sorted(kept)]
        return pairs


class BestVsRest(PairSelector):
    """The best response (among equal ones the first) against each worse one.

    Args:
        min_margin: Pairs whose rewards differ by at most this much are left out, in reward units.
    """

    gives_ties = False

    def __init__(self, min_margin: float = 0.0) -> None:
        check_at_least("rollout.selector", min_margin=(min_margin, 0))
        self.min_margin = min_margin

    def __call__(
        self, rewards: Sequence[float], lengths: Sequence[int], finished: Sequence[bool], seed: int
    ) -> list[Pair]:
        best = rewards.index(max(rewards))
        return [(best, i) for i, reward in enumerate(rewards) if _exceeds(rewards[best] - reward, self.min_margin)]


class LengthMatched(PairSelector):
    """The pair with the largest margin among those of similar length, so that length alone is not learned.

    Args:
        max_difference: Largest difference in tokens, as a share of the longer response.
        min_margin: Pairs whose rewards differ by at most this much are left out, in reward units.
    """

    gives_ties = False
    gives_one_pair = True

    def __init__(self, max_difference: float = 0.2, min_margin: float = 0.0) -> None:
        check_at_least("rollout.selector", max_difference=(max_difference, 0), min_margin=(min_margin, 0))
        if max_difference >= 1:
            raise InputError(
                f"`rollout.selector.max_difference` must be below 1, got {max_difference}: it is a share of the longer "
                "response. Use BestWorst for pairs of any lengths."
            )
        self.max_difference, self.min_margin = max_difference, min_margin

    def __call__(
        self, rewards: Sequence[float], lengths: Sequence[int], finished: Sequence[bool], seed: int
    ) -> list[Pair]:
        pairs = [
            (i, j)
            for i in range(len(rewards))
            for j in range(len(rewards))
            if _exceeds(rewards[i] - rewards[j], self.min_margin)
            and abs(lengths[i] - lengths[j]) <= self.max_difference * max(lengths[i], lengths[j])
        ]
        return [max(pairs, key=lambda pair: rewards[pair[0]] - rewards[pair[1]])] if pairs else []


def _exceeds(margin: float, floor: float) -> bool:
    """Whether a margin is above a floor by more than rounding, or the breaking of ties, adds to it."""
    return margin > floor and not math.isclose(margin, floor, rel_tol=1e-9)
