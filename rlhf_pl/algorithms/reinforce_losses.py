"""REINFORCE with a baseline of the prompt's other responses, and REINFORCE++, which normalises over a whole round."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from rlhf_pl.algorithms.advantages import GroupAdvantage, check_group_advantage, group_advantages
from rlhf_pl.algorithms.importance import ImportanceCorrection
from rlhf_pl.algorithms.kl_estimates import KLTerm
from rlhf_pl.algorithms.policy_gradient import Aggregation, PolicyGradientLoss, Truncated
from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.algorithms.prompt_groups import PromptGroups, segment_sums

WHITENING_EPS = 1e-8  # added to a variance


class ReinforceLoss(PolicyLoss):
    """REINFORCE: -A log pi of each response, without a ratio to pi_old.

    Only a round's first update is on-policy; with several, choose a small rate, or a loss with a ratio.

    Args:
        advantage: `leave_one_out` (RLOO's), `group_mean` or `group_normalized`; `none` for the reward itself.
    """

    needs = frozenset({"rewards"})
    per = "response"
    metric_names = ("entropy",)

    def __init__(
        self, advantage: Literal["leave_one_out", "group_mean", "group_normalized", "none"] = "leave_one_out"
    ) -> None:
        if advantage != "none":
            check_group_advantage(advantage)
        self.advantage = advantage
        self.normalizes = "prompt" if advantage == "group_normalized" else None  # type: ignore[misc]
        self.least_responses = 1 if advantage == "none" else 2  # type: ignore[misc]

    def losses(self, groups: PromptGroups) -> Tensor:
        if self.advantage == "none":
            return -groups.rewards * groups.logps
        kind: GroupAdvantage = self.advantage
        return -group_advantages(kind, groups) * groups.logps

    def metrics(self, groups: PromptGroups) -> dict[str, Tensor]:
        return {"entropy": -groups.token_logps}

    @property
    def meaning(self) -> str:
        factor = "reward" if self.advantage == "none" else "advantage"
        return (
            f"mean of -{factor} x log-prob of a response, a surrogate of any size and sign: no measure of progress, as "
            "only its gradient counts; look at the reward"
        )


class ReinforcePlusPlusLoss(PolicyGradientLoss):
    """REINFORCE++: returns of tokens, normalised over the whole round; clipped ratios of tokens (arXiv:2501.03262).

    The return of a token is the sum of the rewards of the tokens from it on: the KL penalty of `model.kl_coef` is that
    of each token, and the last token has the score.

    Args:
        baseline: Subtract the mean score of the prompt's responses first, at least two: the baseline variant.
        clip_low: How far below 1 the ratio has an effect; null for no limit.
        clip_high: How far above 1; null for no limit.
        aggregation: `token` for the mean over all tokens of an update; `response` for the mean over responses of the
            means over their tokens; `constant` for sums over tokens divided by `constant_tokens`.
        constant_tokens: Tokens that sums are divided by, with `constant` alone.
        truncated: `mask` to leave out the tokens of truncated responses, which still count in the normalisation.
        kl: KL term to the reference, for the baseline variant of the paper with k2; null for none.
        correction: Weights for responses that another policy than pi_old has sampled; null for none.
    """

    kl_per_token = True
    round_values = ("advantages",)
    normalizes = "round"

    def __init__(
        self,
        baseline: bool = False,
        clip_low: float | None = 0.2,
        clip_high: float | None = 0.2,
        aggregation: Aggregation = "token",
        constant_tokens: int | None = None,
        truncated: Truncated = "keep",
        kl: KLTerm | None = None,
        correction: ImportanceCorrection | None = None,
    ) -> None:
        self.baseline = baseline
        self.least_responses = 2 if baseline else 1  # type: ignore[misc]
        super().__init__("token", clip_low, clip_high, aggregation, constant_tokens, truncated, kl, correction)

    def of_round(self, read: Callable[[], Iterator[PromptGroups]]) -> dict[str, Tensor]:
        return {"advantages": whiten(torch.cat([self._returns(groups) for groups in read()]))}

    def _returns(self, groups: PromptGroups) -> Tensor:
        rewards = groups.token_rewards()
        if self.baseline:
            scores = groups.rewards
            if groups.kl_coef:
                scores = scores + groups.kl_coef * (groups.old_logps - groups.reference_logps)
            rewards = rewards.index_add(0, groups.lengths.cumsum(0) - 1, -groups.group_means(scores))
        return returns_to_go(rewards, groups.lengths)

    def advantages(self, groups: PromptGroups) -> Tensor:
        return groups.stored["advantages"]


def returns_to_go(token_rewards: Tensor, lengths: Tensor) -> Tensor:
    """Sum of the rewards of a token and of those after it in its response.

    By hand: rewards -0.1, 0, 2 of one response give 1.9, 2, 2.

    Args:
        token_rewards: Shape (M,), reward units.
        lengths: Tokens of each response, shape (R,), int64.

    Returns:
        Shape (M,), reward units.
    """
    sums = token_rewards.double()
    totals = segment_sums(sums, lengths)
    cumulated = sums.cumsum(0)
    starts = torch.cat([cumulated.new_zeros(1), cumulated[lengths.cumsum(0) - 1][:-1]])
    before = cumulated - sums - torch.repeat_interleave(starts, lengths)
    return (torch.repeat_interleave(totals, lengths) - before).float()


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """Divide by the standard deviation (of a sample), and subtract the mean; computed in float64.

    Equal values give 0, or without `shift_mean` stay what they are.

    Args:
        values: Shape (N,).
        shift_mean: Whether to subtract the mean.

    Returns:
        Shape (N,), float32.
    """
    exact = values.double()
    if len(exact) < 2 or bool((exact == exact[0]).all()):
        return torch.zeros_like(values) if shift_mean else values
    scaled = (exact - exact.mean()) * (exact.var() + WHITENING_EPS).rsqrt()
    return (scaled if shift_mean else scaled + exact.mean()).float()
