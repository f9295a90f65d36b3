"""Pair selectors: which two answers of one prompt become (chosen, rejected)."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence

from rlhf_pl.utils.errors import at_least

Pair = tuple[int, int]


class PairSelector(ABC):
    """Picks pairs among the answers to one prompt. Subclass it and name your class in `rollout.selector.class_path`.

    The chosen answer must have a strictly higher reward than the rejected one; `RoundRefresh` drops prompts for
    which no pair is returned and counts them. Penalties and normalisation are in the rewards. Where `model.kl_coef`
    will break ties, it shows the rewards with ties broken by lot, by the least that can be told, so that none is
    dropped for a tie; but in round 1 of a run whose policy starts as the reference, where the KL term is 0.
    """

    @abstractmethod
    def __call__(
        self, rewards: Sequence[float], lengths: Sequence[int], finished: Sequence[bool], seed: int
    ) -> list[Pair]:
        """Pairs of one prompt.

        Args:
            rewards: One per answer.
            lengths: Response tokens of each answer.
            finished: Whether each answer ended with an EOS.
            seed: This prompt's seed, for selectors that draw.

        Returns:
            (chosen index, rejected index) for each pair; empty to drop the prompt.
        """


class BestWorst(PairSelector):
    """The best against the worst answer; of equals the first.

    Args:
        min_margin: Drop prompts whose best and worst reward differ by no more than this, in reward units.
    """

    def __init__(self, min_margin: float = 0.0) -> None:
        at_least("rollout.selector", min_margin=(min_margin, 0))
        self.min_margin = min_margin

    def __call__(
        self, rewards: Sequence[float], lengths: Sequence[int], finished: Sequence[bool], seed: int
    ) -> list[Pair]:
        best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
        return [(best, worst)] if rewards[best] - rewards[worst] > self.min_margin else []


class RandomPair(PairSelector):
    """Two answers drawn at random, the better one chosen; a tie is drawn again until none is left.

    Unlike best against worst, the pair is a fair sample of the policy, as in the REBEL paper's online runs.
    """

    def __call__(
        self, rewards: Sequence[float], lengths: Sequence[int], finished: Sequence[bool], seed: int
    ) -> list[Pair]:
        pairs = [(i, j) for i in range(len(rewards)) for j in range(len(rewards)) if rewards[i] > rewards[j]]
        return [random.Random(seed).choice(pairs)] if pairs else []
