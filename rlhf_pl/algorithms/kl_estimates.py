"""Estimates of a KL divergence from single tokens, and the KL term of a loss."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rlhf_pl.utils.errors import InputError

ESTIMATORS = ("k1", "k2", "k3")


def kl_estimates(logratios: Tensor) -> dict[str, Tensor]:
    """Three estimates of KL(p || q) for tokens that were sampled from p.

        k1 = log p - log q,   k2 = k1**2 / 2,   k3 = r - 1 - log r with r = q / p

    k1 and k3 are unbiased; k2 and k3 are never negative. By hand: log p - log q = 0.5 gives 0.5, 0.125 and
    exp(-0.5) - 1 + 0.5 = 0.106531.

    Args:
        logratios: log p - log q of each token, shape (M,), float32, nats.

    Returns:
        By name, each of shape (M,), nats.

    Source: John Schulman, "Approximating KL divergence", 2020; k3 in a loss: arXiv:2402.03300, Eq. 4.
    """
    return {"k1": logratios, "k2": logratios.square() / 2, "k3": (-logratios).expm1() + logratios}


@dataclass(frozen=True)
class KLTerm:
    """KL(pi || pi_ref) in a loss, estimated at each token. (`model.kl_coef` puts k1 into the reward instead.)

    Args:
        coef: Weight, loss units per nat, positive. TRL's `beta`.
        estimator: k3 = r - 1 - log r with r = pi_ref / pi, or k2 = (log r)**2 / 2. k1 has no expected gradient here.
        by_ratio: Multiply the estimate by the ratio pi / pi_old (for k2 without its gradient), so that the gradient
            stays that of KL(pi || pi_ref) when the policy has moved from pi_old. At k3 the gradient of the ratio counts
            in the first update as well (arXiv:2512.02556, Sec. 3.1). false for the term of the GRPO paper. TRL's
            `use_bias_correction_kl`.
    """

    coef: float = 0.04
    estimator: Literal["k1", "k2", "k3"] = "k3"  # k1 is known, to say why not
    by_ratio: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.coef < float("inf"):
            raise InputError(f"`model.loss.kl.coef` must be positive and finite, got {self.coef}. For no KL term leave "
                             "`model.loss.kl` out.")  # fmt: skip
        if self.estimator == "k1":
            raise InputError(
                "`model.loss.kl.estimator` is k1, whose gradient is 0 in expectation in a loss. Use k3 or k2, or "
                "`model.kl_coef`, which subtracts k1 from the reward."
            )
        if self.estimator not in ESTIMATORS:
            raise InputError(f"`model.loss.kl.estimator` must be k2 or k3, got {self.estimator!r}.")

    def values(self, token_logps: Tensor, reference_token_logps: Tensor, ratios: Tensor) -> Tensor:
        """The term of each token.

        Args:
            token_logps: log pi, shape (M,), nats, with gradient.
            reference_token_logps: log pi_ref, shape (M,), nats.
            ratios: pi / pi_old of each token, shape (M,), with gradient.

        Returns:
            Shape (M,), loss units.
        """
        estimates = kl_estimates(token_logps - reference_token_logps)[self.estimator]
        if self.by_ratio:
            estimates = estimates * (ratios.detach() if self.estimator == "k2" else ratios)
        return self.coef * estimates
