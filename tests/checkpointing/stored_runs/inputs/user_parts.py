"""A user's own reward and loss, named in the configs by their paths."""

from torch import Tensor

from rlhf_pl import PairwiseLoss, RebelLoss


def variety(response: str) -> float:
    return len(set(response)) / 10


class HalfRebel(PairwiseLoss):
    """Half of REBEL's loss."""

    def __init__(self, eta: float = 1.0) -> None:
        self.eta = eta
        self._whole = RebelLoss(eta)

    def __call__(self, chosen_logratios: Tensor, rejected_logratios: Tensor, reward_margins: Tensor) -> Tensor:
        return self._whole(chosen_logratios, rejected_logratios, reward_margins) / 2
