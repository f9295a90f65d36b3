"""The reward of a run whose rounds are scored already."""

from collections.abc import Sequence

from rlhf_pl.rewards.base import Failure, Reward, RewardResult, Sample


class StoredReward(Reward):
    """Stands for the rewards that come with the rounds of another run; it scores nothing."""

    def score(self, batch: Sequence[Sample]) -> Sequence[RewardResult | Failure]:
        raise RuntimeError("The rewards of these rounds are stored: nothing is scored.")
