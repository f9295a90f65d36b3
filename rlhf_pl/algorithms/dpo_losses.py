"""DPO and its relatives on the margin of two log-ratios to the fixed reference: DPO, robust DPO, IPO, hinge."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_pl.algorithms.loss_arguments import check_label_smoothing, check_positive, check_tensors
from rlhf_pl.algorithms.policy_loss import PairwiseLoss, PolicyLoss
from rlhf_pl.algorithms.prompt_groups import PromptGroups


def dpo_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: the negative log-likelihood of the preference, with beta times log-ratios as implicit rewards.

        m = beta * (chosen - rejected),  loss = -(1 - s) * log sigmoid(m) - s * log sigmoid(-m)

    By hand: log-ratios 0.5 and -0.5 with beta 2 have m = 2, and -log sigmoid(2) = 0.126928; with s = 0.25 the loss is
    0.75 * 0.126928 + 0.25 * 2.126928 = 0.626928.

    Args:
        chosen_logratios: log pi_theta - log pi_ref, summed over response tokens, shape (B,), float32, nats.
        rejected_logratios: The same for the rejected response, shape (B,).
        beta: Implicit reward per nat, positive; smaller moves further from the reference.
        label_smoothing: s, the assumed probability that a preference is wrong, in [0, 0.5).

    Returns:
        Loss per pair, shape (B,), nats, not reduced.

    Raises:
        ValueError: The shapes differ.

    Source: arXiv:2305.18290, Eq. 7; with label smoothing conservative DPO (cDPO), of Mitchell, "A note on DPO with
    noisy preferences and relationship to IPO" (2023).
    """
    check_tensors(chosen_logratios, rejected_logratios)
    margins = beta * (chosen_logratios - rejected_logratios)
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def robust_dpo_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float
) -> Tensor:
    """Robust DPO: an unbiased estimate of DPO's loss under right preferences, from preferences with random errors.

        m = beta * (chosen - rejected),  loss = (-(1 - s) * log sigmoid(m) + s * log sigmoid(-m)) / (1 - 2 s)

    By hand: log-ratios 0.5 and -0.5 with beta 2 and s = 0.25 give (0.75 * 0.126928 - 0.25 * 2.126928) / 0.5 =
    -0.873072. A loss below 0 is no error: it is one in the mean over right and wrong preferences.

    Args:
        chosen_logratios: log pi_theta - log pi_ref, summed over response tokens, shape (B,), float32, nats.
        rejected_logratios: The same for the rejected response, shape (B,).
        beta: Implicit reward per nat, positive.
        label_smoothing: s, the probability that a preference is wrong, in [0, 0.5).

    Returns:
        Loss per pair, shape (B,), nats, not reduced.

    Raises:
        ValueError: The shapes differ.

    Source: arXiv:2403.00409, Sec. 3.
    """
    check_tensors(chosen_logratios, rejected_logratios)
    margins = beta * (chosen_logratios - rejected_logratios)
    right, wrong = -logsigmoid(margins), -logsigmoid(-margins)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def ipo_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, tau: float) -> Tensor:
    """IPO: regress the log-ratio margin of every pair onto the same target.

        loss = ((chosen - rejected) - 1 / (2 tau))^2

    By hand: log-ratios 3 and 1 with tau 0.1 have the target 5: (2 - 5)^2 = 9.

    Args:
        chosen_logratios: log pi_theta - log pi_ref, summed over response tokens or their mean, shape (B,), float32,
            nats. With means, `tau` does not depend on the length of responses.
        rejected_logratios: The same for the rejected response, shape (B,).
        tau: Regularization, positive; smaller moves further from the reference.

    Returns:
        Loss per pair, shape (B,), squared nats, not reduced.

    Raises:
        ValueError: The shapes differ.

    Source: arXiv:2310.12036, Eq. 17.
    """
    check_tensors(chosen_logratios, rejected_logratios)
    return (chosen_logratios - rejected_logratios - 1 / (2 * tau)) ** 2


def hinge_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """Hinge loss of SLiC on log-ratios: 0 for pairs with a margin of at least 1.

        loss = max(0, 1 - beta * (chosen - rejected))

    By hand: log-ratios 2 and -1 with beta 0.1 give 1 - 0.3 = 0.7.

    Args:
        chosen_logratios: log pi_theta - log pi_ref, summed over response tokens, shape (B,), float32, nats.
        rejected_logratios: The same for the rejected response, shape (B,).
        beta: Implicit reward per nat, positive.

    Returns:
        Loss per pair, shape (B,), not reduced.

    Raises:
        ValueError: The shapes differ.

    Source: arXiv:2309.06657 (RSO), its `hinge-norm`: the hinge loss of SLiC (arXiv:2305.10425) on log-ratios.
    """
    check_tensors(chosen_logratios, rejected_logratios)
    return (1 - beta * (chosen_logratios - rejected_logratios)).relu()


SATURATES_AT = 4.0  # beta x log-ratio at which a sigmoid's gradient is below a tenth of that at 0
_LOGISTIC = "; 0.693 (log 2) where the policy is the reference; it falls as chosen responses gain on rejected ones"


class ReferenceLoss(PairwiseLoss):
    """Base of losses on log-ratios to the fixed reference that `beta` scales.

    Args:
        beta: Implicit reward per nat, positive; smaller moves further from the reference.
    """

    needs = frozenset({"reference_logps"})

    def __init__(self, beta: float = 0.1) -> None:
        check_positive(beta=beta)
        self.beta = beta

    @property
    def larger_steps(self) -> Mapping[str, str]:
        return {"beta": "lower"}

    @property
    def reach(self) -> float:
        return SATURATES_AT / self.beta


class DPOLoss(ReferenceLoss):
    """DPO, relative to the fixed reference (arXiv:2305.18290); with label smoothing conservative DPO (cDPO).

    Args:
        beta: Implicit reward per nat, positive; smaller moves further from the reference.
        label_smoothing: Assumed probability that a preference is wrong, at least 0 and below 0.5.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__(beta)
        check_label_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing

    def __call__(self, chosen_logratios: Tensor, rejected_logratios: Tensor, reward_margins: Tensor) -> Tensor:
        return dpo_loss(chosen_logratios, rejected_logratios, self.beta, self.label_smoothing)

    @property
    def meaning(self) -> str:
        return f"logistic loss of beta x log-ratio margin to the reference, nats{_LOGISTIC}"


class RobustDPOLoss(ReferenceLoss):
    """Robust DPO, for preferences of which a known share is wrong (arXiv:2403.00409).

    Args:
        beta: Implicit reward per nat, positive; smaller moves further from the reference.
        label_smoothing: Probability that a preference is wrong, at least 0 and below 0.5.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.1) -> None:
        super().__init__(beta)
        check_label_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing

    def __call__(self, chosen_logratios: Tensor, rejected_logratios: Tensor, reward_margins: Tensor) -> Tensor:
        return robust_dpo_loss(chosen_logratios, rejected_logratios, self.beta, self.label_smoothing)

    @property
    def meaning(self) -> str:
        return (
            "logistic loss of beta x log-ratio margin to the reference, corrected for wrong preferences, nats"
            f"{_LOGISTIC}, also below 0"
        )


class IPOLoss(PolicyLoss):
    """IPO: regress the margin of every pair onto 1 / (2 tau) (arXiv:2310.12036).

    Args:
        tau: Regularization towards the reference, positive; smaller moves further from it.
        mean_over_tokens: Divide log-ratios by the lengths of their responses, so that `tau` does not depend on these.
            False for sums over tokens, as the paper writes it.
    """

    needs = frozenset({"reference_logps"})
    per = "pair"

    def __init__(self, tau: float = 0.1, mean_over_tokens: bool = True) -> None:
        check_positive(tau=tau)
        self.tau, self.mean_over_tokens = tau, mean_over_tokens

    def losses(self, groups: PromptGroups) -> Tensor:
        logratios = groups.pair_logps - groups.pairs(groups.reference_logps)
        chosen, rejected = logratios / groups.pairs(groups.lengths) if self.mean_over_tokens else logratios
        return ipo_loss(chosen, rejected, self.tau)

    @property
    def meaning(self) -> str:
        target, per = 1 / (2 * self.tau), " a token" if self.mean_over_tokens else ""
        return (
            f"squared distance of the log-ratio margin to the reference from 1 / (2 tau) = {target:.3g} nats{per}; "
            f"{target**2:.3g} where the policy is the reference; it falls towards 0 as the margins get there"
        )

    @property
    def larger_steps(self) -> Mapping[str, str]:
        return {"tau": "lower"}

    @property
    def reach(self) -> float:
        return 1 / (2 * self.tau)  # with the mean over tokens that of responses of one token, the least


class HingeLoss(ReferenceLoss):
    """The hinge loss of SLiC on log-ratios to the fixed reference (arXiv:2309.06657).

    Args:
        beta: Implicit reward per nat, positive; smaller moves further from the reference.
    """

    def __call__(self, chosen_logratios: Tensor, rejected_logratios: Tensor, reward_margins: Tensor) -> Tensor:
        return hinge_loss(chosen_logratios, rejected_logratios, self.beta)

    @property
    def meaning(self) -> str:
        return (
            "mean of 1 - beta x log-ratio margin to the reference, 0 for pairs where that is negative; 1 where the "
            "policy is the reference; it falls as chosen responses gain on rejected ones"
        )

    @property
    def reach(self) -> float:
        return 1 / self.beta
