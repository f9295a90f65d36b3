"""Pair selectors: which two responses to a prompt become (chosen, rejected)."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence

from rlhf_pl.utils.errors import check_at_least

Pair = tuple[int, int]


class PairSelector(ABC):
    """Selects pairs of responses to a prompt. Subclass it and name your class in `rollout.selector.class_path`.

    The chosen response must have a strictly higher reward than the rejected one. `RoundRefresh` drops prompts without
    a pair and counts them. The rewards include penalties and normalisation. Where `model.kl_coef` will break ties, the
    selector sees rewards whose ties are broken at random, by the smallest representable difference, so that no prompt
    is dropped for a tie. This does not apply to round 1 of a run that starts at the reference, where the KL term is 0.
    """

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

    def __init__(self, min_margin: float = 0.0) -> None:
        check_at_least("rollout.selector", min_margin=(min_margin, 0))
        self.min_margin = min_margin

    def __call__(
        self, rewards: Sequence[float], lengths: Sequence[int], finished: Sequence[bool], seed: int
    ) -> list[Pair]:
        best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
        return [(best, worst)] if rewards[best] - rewards[worst] > self.min_margin else []


class RandomPair(PairSelector):
    """Two responses at random, the better one chosen; uniform over all pairs of different rewards.

    Unlike best against worst, the pair is an unbiased sample of the policy, as in the REBEL paper's online runs.
    """

    def __call__(
        self, rewards: Sequence[float], lengths: Sequence[int], finished: Sequence[bool], seed: int
    ) -> list[Pair]:
        pairs = [(i, j) for i in range(len(rewards)) for j in range(len(rewards)) if rewards[i] > rewards[j]]
        return [random.Random(seed).choice(pairs)] if pairs else []
