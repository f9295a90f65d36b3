"""REBEL and the losses of reward models; and all losses of a policy by their names, for the command line."""

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_pl.algorithms.apo_losses import APODownLoss, APOZeroLoss
from rlhf_pl.algorithms.auto_eta import DEFAULT_SPREAD, check_targets, eta_by_kl, eta_by_spread
from rlhf_pl.algorithms.chosen_nll import ChosenNLL
from rlhf_pl.algorithms.dpo_losses import DPOLoss, HingeLoss, IPOLoss, RobustDPOLoss
from rlhf_pl.algorithms.grpo_losses import CISPOLoss, DAPOLoss, DrGRPOLoss, GRPOLoss, GSPOLoss, RLOOLoss
from rlhf_pl.algorithms.kto_loss import KTOLoss
from rlhf_pl.algorithms.orpo_loss import ORPOLoss
from rlhf_pl.algorithms.policy_gradient import PolicyGradientLoss
from rlhf_pl.algorithms.policy_loss import PairwiseLoss, PolicyLoss
from rlhf_pl.algorithms.ppo_loss import PPOLoss
from rlhf_pl.algorithms.reference_free_losses import CPOLoss, SimPOLoss
from rlhf_pl.algorithms.reinforce_losses import ReinforceLoss, ReinforcePlusPlusLoss
from rlhf_pl.algorithms.round_facts import Choice, RoundFacts
from rlhf_pl.algorithms.sppo_losses import SPPOHardLoss, SPPOLoss
from rlhf_pl.algorithms.sum_of_losses import SumOfLosses
from rlhf_pl.utils.errors import InputError

__all__ = [
    "APODownLoss",
    "APOZeroLoss",
    "CISPOLoss",
    "CPOLoss",
    "ChosenNLL",
    "DAPOLoss",
    "DPOLoss",
    "DrGRPOLoss",
    "GRPOLoss",
    "GSPOLoss",
    "HingeLoss",
    "IPOLoss",
    "KTOLoss",
    "ORPOLoss",
    "PPOLoss",
    "PairwiseLoss",
    "PolicyGradientLoss",
    "PolicyLoss",
    "RLOOLoss",
    "RebelLoss",
    "ReinforceLoss",
    "ReinforcePlusPlusLoss",
    "RobustDPOLoss",
    "SPPOHardLoss",
    "SPPOLoss",
    "SimPOLoss",
    "SumOfLosses",
    "bradley_terry_loss",
    "centering_loss",
    "rebel_loss",
]


def rebel_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, reward_margins: Tensor, eta: float) -> Tensor:
    """Squared error between each pair's log-ratio margin and its scaled reward margin.

    This is the objective of the paper times eta**2, as in the authors' code: the minimiser is the same, and their
    published `eta` and learning rates carry over.

    Args:
        chosen_logratios: log pi_theta - log pi_old, summed over response tokens, shape (B,), float32, nats.
        rejected_logratios: The same for the rejected response, shape (B,).
        reward_margins: Chosen minus rejected reward, shape (B,), reward units.
        eta: Nats per reward unit, positive; larger moves further from pi_old.

    Returns:
        Loss per pair, shape (B,), squared nats, not reduced.

    Raises:
        ValueError: `eta` is not positive and finite, or the shapes differ.

    Source: arXiv:2404.16767, Eq. 3, times eta**2.
    """
    if not 0 < eta < math.inf:
        raise ValueError(f"`eta` must be positive and finite, got {eta}.")
    if not chosen_logratios.shape == rejected_logratios.shape == reward_margins.shape:
        shapes = [tuple(t.shape) for t in (chosen_logratios, rejected_logratios, reward_margins)]
        raise ValueError(f"Log-ratios and reward margins must have one shape (B,), got {shapes}.")
    return (chosen_logratios - rejected_logratios - eta * reward_margins) ** 2


class RebelLoss(PairwiseLoss):
    """REBEL: regress the log-ratio margin of a pair onto its reward margin (arXiv:2404.16767).

    Args:
        eta: Nats per reward unit, positive; larger moves further from pi_old, the policy that sampled the round. `auto`
            chooses it for each round from the round's rewards, by one of the two targets: see "eta: auto" in
            docs/how_it_works.md.
        target_spread: With `eta: auto`, the root mean square of the targets (eta times a pair's reward margin) over the
            round's pairs, nats; 2 if neither target is given.
        target_kl: With `eta: auto`, the KL(new || old) that a round should reach, nats per response; corrected after
            each round by the KL that it has reached.
    """

    ties = True

    def __init__(
        self,
        eta: float | Literal["auto"] = "auto",
        target_spread: float | None = None,
        target_kl: float | None = None,
    ) -> None:
        check_targets(eta, target_spread, target_kl)
        self.eta = eta
        if eta == "auto" and target_kl is not None:  # only what has an effect is a setting
            self.target_kl = float(target_kl)
        elif eta == "auto":
            self.target_spread = DEFAULT_SPREAD if target_spread is None else float(target_spread)

    @property
    def meaning(self) -> str:
        return (
            "mean of (log-ratio margin - eta x reward margin)^2, squared nats; a round starts at the mean of "
            "(eta x reward margin)^2, its squared targets, and falls towards 0 as they are reached"
        )

    @property
    def larger_steps(self) -> Mapping[str, str]:
        if self.eta != "auto":
            return {"eta": "raise or set to auto"}
        return {"target_kl" if hasattr(self, "target_kl") else "target_spread": "raise"}

    @property
    def chooses(self) -> tuple[str, ...]:
        return ("eta",) if self.eta == "auto" else ()

    def choose(self, facts: RoundFacts) -> Choice:
        if hasattr(self, "target_kl"):
            return eta_by_kl(facts, self.target_kl)
        return eta_by_spread(facts, self.target_spread)

    @property
    def current_eta(self) -> float:
        """`eta`, or what was chosen for the round.

        Raises:
            InputError: `eta` is auto, and no round was read yet.
        """
        found = self.choice.get("eta") if self.eta == "auto" else self.eta
        if not isinstance(found, float | int):
            raise InputError("`model.loss.eta` is auto: it is known once a round is read for training.")
        return found

    def targets(self, reward_margins: Tensor) -> Tensor:
        return self.current_eta * reward_margins

    def __call__(self, chosen_logratios: Tensor, rejected_logratios: Tensor, reward_margins: Tensor) -> Tensor:
        return rebel_loss(chosen_logratios, rejected_logratios, reward_margins, self.current_eta)


def bradley_terry_loss(margins: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of the preferred one of two responses.

    Args:
        margins: Score of the chosen minus that of the rejected response, shape (B,), float32, reward units.
        labels: Probability that the chosen response is the better one, shape (B,); 1, or 0.5 for a tie.
        targets: Margin by which the chosen response should win, shape (B,), reward units; 0 in the plain model.

    Returns:
        Loss per pair, shape (B,), nats, not reduced.

    Source: arXiv:2203.02155, Eq. 1; targets as in arXiv:2307.09288, Eq. 2.
    """
    return -labels * logsigmoid(margins - targets) - (1 - labels) * logsigmoid(-margins - targets)


def centering_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Squared sum of a pair's scores, shape (B,). It keeps scores near 0; comparisons alone leave their level open.

    Source: arXiv:2312.09244, Sec. 2.
    """
    return (chosen_scores + rejected_scores) ** 2
