"""Importance ratios of a policy gradient, and weights that correct for another policy having sampled the responses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rlhf_pl.algorithms.prompt_groups import SAMPLING_LOGPS, PromptGroups
from rlhf_pl.utils.errors import InputError

LOG_LIMIT = 20.0  # nats; of log-weights in statistics, so that their squares stay finite in float32
_VANISHED = 1e-6  # mean square of weights, of which float32 keeps no digit in the moments of weight - 1
RatioLevel = Literal["token", "sequence", "sequence_mean"]


def log_ratios(level: RatioLevel, groups: PromptGroups) -> Tensor:
    """log pi - log pi_old at a level: of each token, shape (M,); or of each response, shape (R,), with gradient.

    Args:
        level: `token`; `sequence` for the sum over a response's tokens; `sequence_mean` for the mean over them (GSPO,
            arXiv:2507.18071, Eq. 7).
        groups: The batch.
    """
    if level == "token":
        return groups.token_logps - groups.old_token_logps
    sums = groups.sum_per_response(groups.token_logps - groups.old_token_logps)
    return sums / groups.lengths if level == "sequence_mean" else sums


@dataclass(frozen=True)
class ImportanceCorrection:
    """Weights pi_old / pi_sampling where another policy than pi_old sampled the responses.

    pi_old is then the policy before the round's first update, computed by the training itself, and pi_sampling is the
    sampler as it reported its log-probs, or the policy of the run that the round comes from (`--rounds_from`).

    Args:
        mode: `truncate` limits the weights to [low, high]; `mask` sets those outside to 0.
        level: `token` for a weight of each token, `sequence` for one of each response.
        high: Largest weight.
        low: Smallest weight.
    """

    mode: Literal["truncate", "mask"] = "truncate"
    level: Literal["token", "sequence"] = "token"
    high: float = 2.0
    low: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("mode", ("truncate", "mask")), ("level", ("token", "sequence"))):
            if getattr(self, name) not in known:
                raise InputError(
                    f"`model.loss.correction.{name}` must be {' or '.join(known)}, got {getattr(self, name)!r}."
                )
        if not 0 <= self.low <= 1 <= self.high < math.inf:
            raise InputError(
                "`model.loss.correction`: low must be from 0 to 1 and high 1 or more and finite, got "
                f"{self.low} and {self.high}."
            )

    def weights(self, groups: PromptGroups) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of the tokens (they have no gradient).

        Returns:
            (weight of each token, shape (M,); weights before they are limited, at their level, shape (M,) or (R,);
            whether each of these is limited, of the same shape, bool).

        Source: arXiv:2510.18855 (masked); both modes and levels: `vllm_importance_sampling_mode` of TRL 1.16, whose
            `vllm_importance_sampling_clip_min` and `..._clip_max` are `low` and `high`.
        """
        log_weights = self._log_weights(groups)
        raw = log_weights.exp()  # infinite for extreme log-ratios, until it is limited
        outside = (raw < self.low) | (raw > self.high)
        weights = raw.clamp(self.low, self.high) if self.mode == "truncate" else raw.masked_fill(outside, 0.0)
        return groups.per_token(weights) if self.level == "sequence" else weights, raw, outside

    def statistics(self, groups: PromptGroups) -> dict[str, Tensor]:
        """What `summarise_weights` makes metrics of, from the weights before they are limited, at their level.

        Weights are taken as at least exp(-20) and at most exp(20). They are near 1, so float32 keeps the variance of
        weight - 1 as small as rounding errors.
        """
        shifts = self._log_weights(groups).clamp(-LOG_LIMIT, LOG_LIMIT).expm1()
        outside = self.weights(groups)[2]
        return {
            "sampling_shift": shifts,
            "sampling_shift_square": shifts.square(),
            "sampling_limited": outside.float(),
        }

    def _log_weights(self, groups: PromptGroups) -> Tensor:
        """Log pi_old - log pi_sampling, nats, shape (M,), or summed over responses, shape (R,)."""
        log_weights = groups.old_token_logps - groups.stored[SAMPLING_LOGPS]
        return groups.sum_per_response(log_weights) if self.level == "sequence" else log_weights


STATISTICS = ("sampling_weight", "sampling_weight_var", "sampling_ess", "sampling_limited")


def summarise_weights(means: Mapping[str, float]) -> dict[str, float]:
    """The metrics `STATISTICS` from an update's means of `ImportanceCorrection.statistics`; others are kept.

    `sampling_weight` is the mean weight w, `sampling_weight_var` its variance (of a population), `sampling_ess` the
    effective sample size as a share of the sample, mean(w)^2 / mean(w^2), and `sampling_limited` the share of weights
    outside the limits.
    """
    found = dict(means)
    if "sampling_shift" not in found:
        return found
    shift, square = found.pop("sampling_shift"), found.pop("sampling_shift_square")
    return {
        **found,
        "sampling_weight": 1 + shift,
        "sampling_weight_var": square - shift * shift,
        "sampling_ess": effective_share(shift, square),
    }


def effective_share(shift: float, square: float) -> float:
    """The effective sample size as a share of the sample, mean(w)^2 / mean(w^2) of weights w.

    By hand: weights 0.5 and 1.5 have the moments 0 and 0.25, which give 1 / 1.25 = 0.8.

    Args:
        shift: Mean of w - 1.
        square: Mean of (w - 1)^2.

    Returns:
        From 0 to 1; NaN where all weights are about 0, so that rounding errors are all that is left of them.
    """
    mean_square = 1 + 2 * shift + square
    return min(1.0, (1 + shift) ** 2 / mean_square) if mean_square > _VANISHED else math.nan
