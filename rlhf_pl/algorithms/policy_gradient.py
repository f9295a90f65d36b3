"""The base of policy gradients: ratio, clipping, aggregation, KL term, correction and metrics, which all have alike."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Literal, get_args

import torch
from torch import Tensor

from rlhf_pl.algorithms.advantages import has_equal_rewards
from rlhf_pl.algorithms.importance import (
    STATISTICS,
    ImportanceCorrection,
    RatioLevel,
    effective_share,
    log_ratios,
    summarise_weights,
)
from rlhf_pl.algorithms.kl_estimates import ESTIMATORS, KLTerm, kl_estimates
from rlhf_pl.algorithms.loss_arguments import check_not_negative, check_positive
from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.algorithms.prompt_groups import SAMPLING_LOGPS, PromptGroups
from rlhf_pl.utils.errors import InputError

_LARGEST_LOG_RATIO = 80.0  # nats; exp of it, times an advantage, is finite in float32
Aggregation = Literal["token", "response", "constant"]
Truncated = Literal["keep", "mask"]


def clipped_surrogate(ratios: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float | None) -> Tensor:
    """PPO's pessimistic surrogate: -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A).

    By hand, with both limits at 0.2: ratio 1.5 gives -1.2 for A = 1 and 1.5 for A = -1; ratio 0.5 gives -0.5 and 0.8.

    Args:
        ratios: pi / pi_old, shape (N,), with gradient.
        advantages: Shape (N,).
        clip_low: How far below 1 a ratio has an effect; None for no limit.
        clip_high: How far above 1; None for no limit.

    Returns:
        Shape (N,), not reduced.

    Source: arXiv:1707.06347, Eq. 7; different limits: arXiv:2503.14476, Eq. 10.
    """
    low = None if clip_low is None else 1 - clip_low
    high = None if clip_high is None else 1 + clip_high
    if low is None and high is None:
        return -ratios * advantages
    return -torch.min(ratios * advantages, ratios.clamp(low, high) * advantages)


class PolicyGradientLoss(PolicyLoss):
    """A policy gradient. Subclass it, with `advantages`; the arguments are those of the subclasses.

    The value of each token is a surrogate of the ratio pi / pi_old and of an advantage, plus the KL term; an update's
    loss is their mean by `aggregation`, over all micro-batches and ranks.

    Args:
        ratio: Level of the ratio; see `log_ratios`.
        clip_low: How far below 1 the ratio has an effect; None for no limit.
        clip_high: How far above 1; None for no limit.
        aggregation: `token` for the mean over all tokens of an update; `response` for the mean over responses of the
            means over their tokens; `constant` for the mean over responses of the sums over their tokens, divided by
            `constant_tokens`.
        constant_tokens: The divisor of `constant`, tokens.
        truncated: `mask` to leave out the tokens of truncated responses, which still count in the baseline of their
            prompt and, except for `token`, as responses with a loss of 0.
        kl: KL term in the loss.
        correction: Weights for responses that another policy than pi_old has sampled.
    """

    def __init__(
        self,
        ratio: RatioLevel,
        clip_low: float | None,
        clip_high: float | None,
        aggregation: Aggregation,
        constant_tokens: int | None = None,
        truncated: Truncated = "keep",
        kl: KLTerm | None = None,
        correction: ImportanceCorrection | None = None,
    ) -> None:
        _check(clip_low, clip_high, aggregation, constant_tokens, truncated)
        self.ratio: RatioLevel = ratio
        self.clip_low, self.clip_high = clip_low, clip_high
        self.aggregation, self.constant_tokens, self.truncated = aggregation, constant_tokens, truncated
        self.kl, self.correction = kl, correction
        nested = {"kl": kl, "correction": correction}
        self.options = {name: asdict(value) for name, value in nested.items() if value is not None}  # as plain values
        self.per = "token" if aggregation == "token" else "response"  # type: ignore[misc]
        needs = {"rewards", "old_token_logps"}
        needs |= set() if kl is None else {"reference_token_logps"}
        needs |= set() if correction is None else {SAMPLING_LOGPS}
        self.needs = frozenset(needs)  # type: ignore[misc]
        self.metric_names = self._metric_names()  # type: ignore[misc]

    @property
    def _penalty(self) -> str:
        """The KL term in the words of `meaning`."""
        return "" if self.kl is None else f" + {self.kl.coef:g} x KL to the reference"

    @property
    def meaning(self) -> str:
        return (
            f"mean of -ratio x advantage{self._penalty}, a surrogate: near 0 at a round's start, where advantages "
            "average out, and no measure of progress, as only its gradient counts; look at reward and KL"
        )

    @abstractmethod
    def advantages(self, groups: PromptGroups) -> Tensor:
        """Advantage of every response, shape (R,), or of every token, shape (M,), without gradient."""

    def surrogate(self, ratios: Tensor, advantages: Tensor, groups: PromptGroups) -> Tensor:
        """The surrogate of each ratio, shape (R,) or (M,), with gradient."""
        return clipped_surrogate(ratios, advantages, self.clip_low, self.clip_high)

    def losses(self, groups: PromptGroups) -> Tensor:
        return self.aggregate(self.token_values(groups), groups)

    def token_values(self, groups: PromptGroups) -> Tensor:
        """The value of every token before aggregation, shape (M,), with gradient."""
        ratios = self.ratios(groups)
        values = _per_token(self.surrogate(ratios, self._at_level(self.advantages(groups), groups), groups), groups)
        if self.correction is not None:
            values = values * self.correction.weights(groups)[0]
        if self.kl is not None:
            token_ratios = _per_token(ratios, groups)
            values = values + self.kl.values(groups.token_logps, groups.reference_token_logps, token_ratios)
        return values

    def ratios(self, groups: PromptGroups) -> Tensor:
        """pi / pi_old at the level of `ratio`, shape (R,) or (M,), with gradient; at most exp(80).

        An infinite ratio would make gradients NaN even where the advantage is 0, or where a limit cuts it off.
        """
        return log_ratios(self.ratio, groups).clamp(max=_LARGEST_LOG_RATIO).exp()

    def aggregate(self, values: Tensor, groups: PromptGroups) -> Tensor:
        """The values of the elements of the mean over an update, from those of tokens, shape (M,)."""
        counted = self._counted(groups.finished)
        if self.aggregation == "token":
            return values if counted is None else values[groups.per_token(counted)]
        sums = groups.sum_per_response(values) / (self.constant_tokens or groups.lengths)
        return sums if counted is None else torch.where(counted, sums, 0.0)

    def counts(self, lengths: Tensor, finished: Tensor) -> Tensor:
        if self.per != "token":
            return torch.ones_like(lengths)
        counted = self._counted(finished)
        return lengths if counted is None else lengths * counted

    def _counted(self, finished: Tensor) -> Tensor | None:
        return finished if self.truncated == "mask" else None

    def _at_level(self, advantages: Tensor, groups: PromptGroups) -> Tensor:
        """Advantages of responses or tokens at the level of the ratio."""
        return _per_token(advantages, groups) if self.ratio == "token" else advantages

    # metrics

    def _metric_names(self) -> tuple[str, ...]:
        names = ["entropy", *(["groups_without_variance"] if self.least_responses > 1 else [])]
        names += ["ess", *(f"kl_old/{name}" for name in ESTIMATORS)]
        names += ["clip_low"] if self.clip_low is not None else []
        names += ["clip_high"] if self.clip_high is not None else []
        names += [f"kl_reference/{name}" for name in ESTIMATORS] if self.kl is not None else []
        if self.correction is not None:
            names += STATISTICS
        return tuple(names)

    @torch.no_grad()
    def metrics(self, groups: PromptGroups) -> dict[str, Tensor]:
        """Metrics, as docs/how_it_works.md lists them; those of ratios are over the tokens or responses that count."""
        found = {"groups_without_variance": has_equal_rewards(groups).float()} if self.least_responses > 1 else {}
        found |= self._ratio_metrics(groups)
        old = groups.old_token_logps
        found |= {f"kl_old/{name}": values for name, values in kl_estimates(old - groups.token_logps).items()}
        token_ratios = (groups.token_logps - old).exp()
        found["entropy"] = -groups.token_logps * token_ratios
        if self.kl is not None:
            estimates = kl_estimates(groups.token_logps - groups.reference_token_logps)
            found |= {f"kl_reference/{name}": values * token_ratios for name, values in estimates.items()}
        if self.correction is not None:
            found |= self.correction.statistics(groups)
        return found

    def _ratio_metrics(self, groups: PromptGroups) -> dict[str, Tensor]:
        ratios, advantages = self.ratios(groups), self._at_level(self.advantages(groups), groups)
        counted = self._counted(groups.finished)
        if counted is not None:
            counted = groups.per_token(counted) if self.ratio == "token" else counted
            ratios, advantages = ratios[counted], advantages[counted]
        found = {"ratio_shift": ratios - 1, "ratio_shift_square": (ratios - 1).square()}
        if self.clip_low is not None:
            found["clip_low"] = ((ratios < 1 - self.clip_low) & (advantages < 0)).float()
        if self.clip_high is not None:
            found["clip_high"] = ((ratios > 1 + self.clip_high) & (advantages > 0)).float()
        return found

    def summarise(self, means: Mapping[str, float]) -> dict[str, float]:
        found = dict(means)
        if "ratio_shift" in found:
            shift, square = found.pop("ratio_shift"), found.pop("ratio_shift_square")
            found["ess"] = effective_share(shift, square)
        return summarise_weights(found)


def _per_token(values: Tensor, groups: PromptGroups) -> Tensor:
    """Values of tokens, from those of tokens or of responses."""
    return values if len(values) == len(groups.token_logps) else groups.per_token(values)


def _check(
    clip_low: float | None, clip_high: float | None, aggregation: str, constant_tokens: int | None, truncated: str
) -> None:
    if aggregation not in get_args(Aggregation):
        known = ", ".join(get_args(Aggregation))
        raise InputError(f"`model.loss.aggregation` must be one of {known}, got {aggregation!r}.")
    if truncated not in get_args(Truncated):
        raise InputError(f"`model.loss.truncated` must be keep or mask, got {truncated!r}.")
    if (aggregation == "constant") != (constant_tokens is not None):
        raise InputError(
            f"`model.loss.aggregation` is {aggregation} and `model.loss.constant_tokens` is {constant_tokens}: give "
            "the number of tokens that sums are divided by with `constant`, and with it alone."
        )
    if constant_tokens is not None:
        check_positive(constant_tokens=constant_tokens)
    if clip_low is not None:
        check_not_negative(clip_low=clip_low)
        if clip_low > 1:
            raise InputError(f"`model.loss.clip_low` must be at most 1, as ratios are above 0, got {clip_low}.")
    if clip_high is not None:
        check_not_negative(clip_high=clip_high)
