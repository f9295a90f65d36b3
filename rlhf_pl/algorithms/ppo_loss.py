"""PPO with a critic: the clipped surrogate of the policy, and the clipped loss of the values."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import ClassVar

import torch
from torch import Tensor

from rlhf_pl.algorithms.gae import GAE
from rlhf_pl.algorithms.importance import ImportanceCorrection
from rlhf_pl.algorithms.kl_estimates import KLTerm
from rlhf_pl.algorithms.loss_arguments import check_positive
from rlhf_pl.algorithms.policy_gradient import Aggregation, PolicyGradientLoss, Truncated
from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.algorithms.prompt_groups import OLD_VALUES, VALUES, PromptGroups
from rlhf_pl.algorithms.reinforce_losses import whiten
from rlhf_pl.algorithms.sum_of_losses import SumOfLosses


class PPOPolicyLoss(PolicyGradientLoss):
    """The policy's part of PPO: clipped ratios of tokens, and advantages by GAE from a critic (arXiv:1707.06347).

    Args:
        gae: How advantages are computed.
        whiten_advantages: Subtract the mean of the advantages of all tokens of the round, and divide by their standard
            deviation.
        clip_low: How far below 1 the ratio has an effect; null for no limit.
        clip_high: How far above 1; null for no limit.
        aggregation: `token` for the mean over all tokens of an update; `response` for the mean over responses of the
            means over their tokens; `constant` for sums over tokens divided by `constant_tokens`.
        constant_tokens: Tokens that sums are divided by, with `constant` alone.
        truncated: `mask` to leave out the tokens of truncated responses, which still count in the whitening.
        kl: KL term to the reference; null for none.
        correction: Weights for responses that another policy than pi_old has sampled; null for none.
    """

    kl_per_token = True
    least_responses = 1
    round_values = ("advantages",)

    def __init__(
        self,
        gae: GAE = GAE(),  # noqa: B008 - frozen; the command line shows it as the default
        whiten_advantages: bool = True,
        clip_low: float | None = 0.2,
        clip_high: float | None = 0.2,
        aggregation: Aggregation = "token",
        constant_tokens: int | None = None,
        truncated: Truncated = "keep",
        kl: KLTerm | None = None,
        correction: ImportanceCorrection | None = None,
    ) -> None:
        super().__init__("token", clip_low, clip_high, aggregation, constant_tokens, truncated, kl, correction)
        self.gae, self.whiten_advantages = gae, whiten_advantages
        self.options = {**self.options, "gae": asdict(gae)}
        self.needs = frozenset({*self.needs, OLD_VALUES})  # type: ignore[misc]

    def of_round(self, read: Callable[[], Iterator[PromptGroups]]) -> dict[str, Tensor]:
        advantages, _ = self.gae.of_round(read)
        return {"advantages": whiten(advantages) if self.whiten_advantages else advantages}

    def advantages(self, groups: PromptGroups) -> Tensor:
        return groups.stored["advantages"]


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float | None) -> Tensor:
    """Half the squared error of values, or of values within `value_clip` of the old ones where that is larger.

        0.5 * max((V - R)**2, (clip(V, V_old - value_clip, V_old + value_clip) - R)**2)

    By hand, for R = 1 and `value_clip` 0.2: V = 0.9 and V_old = 0.5 give 0.5 * (0.7 - 1)**2 = 0.045, without a
    gradient; V = 0.6 and V_old = 0.5 give 0.5 * (0.6 - 1)**2 = 0.08.

    Args:
        values: V, shape (M,), reward units, with gradient.
        old_values: V_old, before the round's first update, shape (M,).
        returns: R, shape (M,).
        value_clip: How far from the old ones values may move before their gradient stops, reward units; None for the
            plain squared error.

    Returns:
        Shape (M,), squared reward units, not reduced.

    Source: TRL's PPO, from the code of arXiv:1707.06347.
    """
    errors = (values - returns).square()
    if value_clip is None:
        return errors / 2
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return torch.max(errors, (clipped - returns).square()) / 2


class ValueLoss(PolicyLoss):
    """The critic's part of PPO: a regression of the values onto the returns of GAE, over all tokens of an update.

    Args:
        gae: How returns are computed: as for the policy's part.
        value_clip: How far from the round's old values they may move before their gradient stops, reward units; null
            for no limit.
    """

    per = "token"
    needs = frozenset({"rewards", OLD_VALUES})
    kl_per_token = True
    least_responses = 1
    round_values = ("returns",)
    metric_names: ClassVar[tuple[str, ...]] = ("value_mean", "return_mean", "value_explained_variance", "value_clip")

    def __init__(
        self,
        gae: GAE = GAE(),  # noqa: B008 - frozen; the command line shows it as the default
        value_clip: float | None = 0.2,
    ) -> None:
        if value_clip is not None:
            check_positive(value_clip=value_clip)
        self.gae, self.value_clip = gae, value_clip
        self.options = {"gae": asdict(gae)}
        if value_clip is None:
            self.metric_names = self.metric_names[:-1]  # type: ignore[misc]

    def of_round(self, read: Callable[[], Iterator[PromptGroups]]) -> dict[str, Tensor]:
        _, returns = self.gae.of_round(read)
        return {"returns": returns}

    def losses(self, groups: PromptGroups) -> Tensor:
        stored = groups.stored
        return clipped_value_loss(stored[VALUES], stored[OLD_VALUES], stored["returns"], self.value_clip)

    @property
    def meaning(self) -> str:
        return (
            "half the squared error of the critic's values to the returns, squared reward units; a round starts at the "
            "critic's error on new responses; it falls as the critic learns, and says nothing about the policy"
        )

    @torch.no_grad()
    def metrics(self, groups: PromptGroups) -> dict[str, Tensor]:
        """Metrics: see docs/ppo.md."""
        values, returns = groups.stored[VALUES], groups.stored["returns"]
        errors = returns - values
        found = {
            "value_mean": values,
            "return_mean": returns,
            "return_square": returns.square(),
            "value_error": errors,
            "value_error_square": errors.square(),
        }
        if self.value_clip is not None:
            found["value_clip"] = (self.losses(groups) > errors.square() / 2).float()
        return found

    def summarise(self, means: Mapping[str, float]) -> dict[str, float]:
        found = dict(means)
        if "return_square" not in found:
            return found
        spread = found.pop("return_square") - found["return_mean"] ** 2
        rest = found.pop("value_error_square") - found.pop("value_error") ** 2
        return found | {"value_explained_variance": 1 - rest / spread if spread > 0 else 0.0}


class PPOLoss(SumOfLosses):
    """PPO: clipped ratios with advantages by GAE, plus `vf_coef` times the clipped loss of the critic's values.

    For `PPOModule`, which has the critic. One response to each prompt is enough. `model.kl_coef` subtracts its KL
    penalty from the reward of each token; the score is the reward of the last one. See docs/ppo.md.

    Args:
        gamma: Discount of the rewards of later tokens, above 0 and at most 1.
        lam: GAE's weight of later temporal-difference errors, from 0 (the critic alone) to 1 (the rewards alone).
        clip_low: How far below 1 the ratio has an effect; null for no limit.
        clip_high: How far above 1; null for no limit.
        value_clip: How far from the round's old values the critic's may move before their gradient stops, reward units;
            null for no limit.
        vf_coef: Weight of the critic's loss.
        whiten_rewards: Divide the deviations of token rewards from their mean by their standard deviation, over the
            round; the mean stays.
        whiten_advantages: Subtract the mean of the advantages of all tokens of the round, and divide by their standard
            deviation.
        aggregation: Of the policy's part: `token` for the mean over all tokens of an update; `response` for the mean
            over responses of the means over their tokens; `constant` for sums over tokens divided by
            `constant_tokens`. The critic's part is always a mean over tokens.
        constant_tokens: Tokens that sums are divided by, with `constant` alone.
        truncated: `mask` to leave out the tokens of truncated responses in the policy's part; they still count in the
            whitening and train the critic.
        kl: KL term to the reference in the loss; null for none.
        correction: Weights for responses that another policy than pi_old has sampled; null for none.
    """

    def __init__(
        self,
        gamma: float = 1.0,
        lam: float = 0.95,
        clip_low: float | None = 0.2,
        clip_high: float | None = 0.2,
        value_clip: float | None = 0.2,
        vf_coef: float = 0.1,
        whiten_rewards: bool = False,
        whiten_advantages: bool = True,
        aggregation: Aggregation = "token",
        constant_tokens: int | None = None,
        truncated: Truncated = "keep",
        kl: KLTerm | None = None,
        correction: ImportanceCorrection | None = None,
    ) -> None:
        check_positive(vf_coef=vf_coef)
        gae = GAE(gamma, lam, whiten_rewards)
        clip = (clip_low, clip_high)
        policy = PPOPolicyLoss(gae, whiten_advantages, *clip, aggregation, constant_tokens, truncated, kl, correction)
        super().__init__([policy, ValueLoss(gae, value_clip)], [1.0, vf_coef])
