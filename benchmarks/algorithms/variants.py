"""The compared algorithms: a loss each, and for losses on pairs a selector of pairs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf_pl.algorithms.losses import DPOLoss, GRPOLoss, PPOLoss, RebelLoss, RLOOLoss
from rlhf_pl.algorithms.pair_selection import AllPairs, BestWorst, PairSelector
from rlhf_pl.algorithms.policy_loss import PolicyLoss


@dataclass(frozen=True)
class Variant:
    """An algorithm.

    Args:
        label: Its name in tables.
        loss: Makes its loss from the `eta` of the task, nats per reward unit.
        selector: Makes the selector of its pairs; None for a loss on all responses.
        has_critic: Whether a critic trains with the policy, at the same rate; it starts from the same model.
    """

    label: str
    loss: Callable[[float], PolicyLoss]
    selector: Callable[[], PairSelector] | None = None
    has_critic: bool = False


VARIANTS = {
    "rebel": Variant("REBEL, best against worst", RebelLoss, BestWorst),
    "rebel-all-pairs": Variant("REBEL, all pairs", RebelLoss, AllPairs),
    "rebel-auto": Variant("REBEL, eta auto", lambda _: RebelLoss("auto"), BestWorst),
    "dpo": Variant("DPO, best against worst", lambda _: DPOLoss(), BestWorst),
    "rloo": Variant("RLOO", lambda _: RLOOLoss()),
    "grpo": Variant("GRPO", lambda _: GRPOLoss()),
    "ppo": Variant("PPO", lambda _: PPOLoss(), has_critic=True),
}
# what explains differences: not compared by default, and not in the plot
EXPLANATIONS = {
    "grpo-unclipped": Variant("GRPO without a clip", lambda _: GRPOLoss(None, None)),
    "rloo-unclipped": Variant("RLOO without a clip", lambda _: RLOOLoss(None, None)),
    "ppo-unclipped": Variant(
        "PPO without clips", lambda _: PPOLoss(clip_low=None, clip_high=None, value_clip=None), has_critic=True
    ),
    "rebel-far": Variant("REBEL, best against worst, eta 1e6", lambda _: RebelLoss(1e6), BestWorst),
    "rebel-all-far": Variant("REBEL, all pairs, eta 1e6", lambda _: RebelLoss(1e6), AllPairs),
    "dpo-all-pairs": Variant("DPO, all pairs", lambda _: DPOLoss(), AllPairs),
}
ALL = {**VARIANTS, **EXPLANATIONS}


def make_module(variant: Variant, policy: str, eta: float, **options: Any) -> Any:
    """The LightningModule that trains `policy` by an algorithm."""
    from rlhf_pl import PPOModule, RebelModule

    module = PPOModule if variant.has_critic else RebelModule
    return module(policy, loss=variant.loss(eta), **options)
