"""What a loss sees of a round before its first update, to choose numbers that hold for the whole round."""

from collections.abc import Mapping
from dataclasses import dataclass

Choice = dict[str, float | str]


@dataclass(frozen=True)
class RoundBefore:
    """The newest earlier round that the loss has chosen for.

    Args:
        choice: What the loss chose.
        kl: How far the round moved the policy, nats per response: KL(new || old) on held-out prompts, or where that is
            not known the round's mean KL(old || new); None if neither is known.
        kl_se: Standard error of the former; None for the latter.
    """

    choice: Mapping[str, float | str]
    kl: float | None
    kl_se: float | None = None


@dataclass(frozen=True)
class RoundFacts:
    """Statistics of a stored round. The KL penalty of `model.kl_coef` is part of its rewards.

    Args:
        pairs: Number of pairs; 0 where the loss trains on whole groups.
        margin_rms: Root mean square of the reward margins over the pairs, reward units; 0 without pairs.
        reward_variance: Variance of the rewards of one prompt's responses, mean over prompts, reward units squared.
        before: The round to correct by; None in a first round.
    """

    pairs: int
    margin_rms: float
    reward_variance: float
    before: RoundBefore | None = None
