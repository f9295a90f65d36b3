"""GRPO and its kin, and RLOO: policy gradients whose baseline is the other responses to a prompt."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlhf_pl.algorithms.advantages import GroupAdvantage, group_advantages
from rlhf_pl.algorithms.importance import ImportanceCorrection
from rlhf_pl.algorithms.kl_estimates import KLTerm
from rlhf_pl.algorithms.loss_arguments import check_not_negative
from rlhf_pl.algorithms.policy_gradient import Aggregation, PolicyGradientLoss, Truncated
from rlhf_pl.algorithms.prompt_groups import PromptGroups


class RLOOLoss(PolicyGradientLoss):
    """RLOO: leave-one-out advantages, and the ratio of whole responses (arXiv:2402.14740).

    For a KL penalty set `model.kl_coef`, which subtracts it from the reward, as the authors do.

    Args:
        clip_low: How far below 1 the ratio has an effect; null for no limit.
        clip_high: How far above 1; null for no limit.
        truncated: `mask` for a loss of 0 of truncated responses, which still count in the baseline of their prompt.
        correction: Weights for responses that another policy than pi_old has sampled; null for none.
    """

    def __init__(
        self,
        clip_low: float | None = 0.2,
        clip_high: float | None = 0.2,
        truncated: Truncated = "keep",
        correction: ImportanceCorrection | None = None,
    ) -> None:
        super().__init__("sequence", clip_low, clip_high, "response", None, truncated, None, correction)

    def advantages(self, groups: PromptGroups) -> Tensor:
        return group_advantages("leave_one_out", groups)


class GRPOLoss(PolicyGradientLoss):
    """GRPO: advantages normalised in each group, ratios of tokens, clipped (arXiv:2402.03300).

    Args:
        clip_low: How far below 1 the ratio has an effect; null for no limit.
        clip_high: How far above 1; null for no limit.
        aggregation: `response` for the mean over responses of the means over their tokens, as in the paper; `token` for
            the mean over all tokens of an update; `constant` for sums over tokens divided by `constant_tokens`.
        constant_tokens: Tokens that sums are divided by, with `constant` alone.
        truncated: `mask` to leave out the tokens of truncated responses, which still count in the baseline of their
            prompt.
        kl: KL term to the reference; null for none.
        correction: Weights for responses that another policy than pi_old has sampled; null for none.
    """

    advantage: GroupAdvantage = "group_normalized"
    normalizes: ClassVar[Literal["prompt", "round"] | None] = "prompt"

    def __init__(
        self,
        clip_low: float | None = 0.2,
        clip_high: float | None = 0.2,
        aggregation: Aggregation = "response",
        constant_tokens: int | None = None,
        truncated: Truncated = "keep",
        kl: KLTerm | None = None,
        correction: ImportanceCorrection | None = None,
    ) -> None:
        super().__init__("token", clip_low, clip_high, aggregation, constant_tokens, truncated, kl, correction)

    def advantages(self, groups: PromptGroups) -> Tensor:
        return group_advantages(self.advantage, groups)


class DrGRPOLoss(GRPOLoss):
    """Dr. GRPO: advantages without division by the standard deviation, sums over tokens divided by a constant.

    Neither long responses nor prompts with almost equal rewards get another weight (arXiv:2503.20783).

    Args:
        constant_tokens: Tokens that sums are divided by; the authors, and TRL, use the largest length of a response.
        clip_low: How far below 1 the ratio has an effect; null for no limit.
        clip_high: How far above 1; null for no limit.
        truncated: `mask` for a loss of 0 of truncated responses, which still count in the baseline of their prompt.
        kl: KL term to the reference; null for none.
        correction: Weights for responses that another policy than pi_old has sampled; null for none.
    """

    advantage: GroupAdvantage = "group_mean"
    normalizes = None

    def __init__(
        self,
        constant_tokens: int,
        clip_low: float | None = 0.2,
        clip_high: float | None = 0.2,
        truncated: Truncated = "keep",
        kl: KLTerm | None = None,
        correction: ImportanceCorrection | None = None,
    ) -> None:
        super().__init__(clip_low, clip_high, "constant", constant_tokens, truncated, kl, correction)


class DAPOLoss(GRPOLoss):
    """DAPO: GRPO with a higher upper limit of the ratio, and the mean over all tokens of an update (arXiv:2503.14476).

    Its other parts are `rollout.refill` (groups without variance are replaced) and `rollout.shaping.length_penalty`
    with `length_free_tokens` (soft punishment of overlong responses), or `truncated: mask`.

    Args:
        clip_low: How far below 1 the ratio has an effect; null for no limit.
        clip_high: How far above 1; null for no limit.
        truncated: `mask` to leave out the tokens of truncated responses, which still count in the baseline of their
            prompt.
        kl: KL term to the reference; null for none.
        correction: Weights for responses that another policy than pi_old has sampled; null for none.
    """

    def __init__(
        self,
        clip_low: float | None = 0.2,
        clip_high: float | None = 0.28,
        truncated: Truncated = "keep",
        kl: KLTerm | None = None,
        correction: ImportanceCorrection | None = None,
    ) -> None:
        super().__init__(clip_low, clip_high, "token", None, truncated, kl, correction)


class GSPOLoss(PolicyGradientLoss):
    """GSPO: GRPO with one ratio a response, exp of the mean log-ratio of its tokens (arXiv:2507.18071).

    Args:
        clip_low: How far below 1 the ratio has an effect; null for no limit. Such ratios are close to 1.
        clip_high: How far above 1; null for no limit.
        truncated: `mask` for a loss of 0 of truncated responses, which still count in the baseline of their prompt.
        kl: KL term to the reference; null for none.
        correction: Weights for responses that another policy than pi_old has sampled; null for none.
    """

    normalizes = "prompt"

    def __init__(
        self,
        clip_low: float | None = 3e-4,
        clip_high: float | None = 4e-4,
        truncated: Truncated = "keep",
        kl: KLTerm | None = None,
        correction: ImportanceCorrection | None = None,
    ) -> None:
        super().__init__("sequence_mean", clip_low, clip_high, "response", None, truncated, kl, correction)

    def advantages(self, groups: PromptGroups) -> Tensor:
        return group_advantages("group_normalized", groups)


class CISPOLoss(PolicyGradientLoss):
    """CISPO: A log pi of each token, times its ratio, limited from above and without gradient (arXiv:2506.13585).

    Unlike with clipping, all tokens keep a gradient. The mean is over all tokens of an update.

    Args:
        clip_high: How far above 1 the factor may be, 0 or more. TRL's `epsilon_high` is 1 more.
        truncated: `mask` to leave out the tokens of truncated responses, which still count in the baseline of their
            prompt.
        kl: KL term to the reference; null for none.
        correction: Weights for responses that another policy than pi_old has sampled; null for none.
    """

    normalizes = "prompt"

    def __init__(
        self,
        clip_high: float = 2.0,
        truncated: Truncated = "keep",
        kl: KLTerm | None = None,
        correction: ImportanceCorrection | None = None,
    ) -> None:
        check_not_negative(clip_high=clip_high)
        super().__init__("token", None, clip_high, "token", None, truncated, kl, correction)

    def advantages(self, groups: PromptGroups) -> Tensor:
        return group_advantages("group_normalized", groups)

    def surrogate(self, ratios: Tensor, advantages: Tensor, groups: PromptGroups) -> Tensor:
        return cispo_surrogate(groups.token_logps, ratios, advantages, 1 + (self.clip_high or 0.0))

    @property
    def meaning(self) -> str:
        return (
            f"mean of -ratio x advantage x log-prob of a token{self._penalty}, a surrogate of any sign: no measure of "
            "progress, as only its gradient counts; look at reward and KL"
        )


def cispo_surrogate(token_logps: Tensor, ratios: Tensor, advantages: Tensor, largest: float) -> Tensor:
    """-min(ratio, largest) * A * log pi, where the ratio has no gradient.

    By hand: ratio 4 with largest 3, A = 2 and log pi = -0.5 give 3 * 2 * 0.5 = 3.

    Args:
        token_logps: log pi of each token, shape (M,), with gradient.
        ratios: pi / pi_old of each token, shape (M,).
        advantages: Of each token, shape (M,).
        largest: Limit of the ratio.

    Returns:
        Shape (M,), not reduced.

    Source: arXiv:2506.13585, Eq. 4 and 5.
    """
    return -torch.clamp(ratios.detach(), max=largest) * advantages * token_logps
