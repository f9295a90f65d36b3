"""The settings of a critic."""

from dataclasses import dataclass
from typing import Any

from rlhf_pl.models.lora import LoRA, record_settings
from rlhf_pl.utils.errors import InputError, check_at_least, check_finite


@dataclass(frozen=True)
class Critic:
    """What computes the values of PPO: a model of its own, or a head on the policy.

    Args:
        model: The model that the critic starts from, a folder or a Hub id: a reward model, whose head it keeps, or a
            causal LM, which gets a new head. Its tokenizer must be the policy's. null for the policy's starting model
            with a new head.
        shares_trunk: Compute the values by a new head on the policy's own hidden states instead: no second model. The
            critic's loss then trains the policy's layers too.
        lr: Peak learning rate of the critic; null for the policy's. The schedule is the same.
        warmup_updates: First updates of the run that train the critic alone; the policy does not change in them.
        lora: Train low-rank adapters and the head of the critic's model instead of all its weights; null for all.
    """

    model: str | None = None
    shares_trunk: bool = False
    lr: float | None = None
    warmup_updates: int = 0
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        check_at_least("model.critic", warmup_updates=(self.warmup_updates, 0))
        if self.lr is not None:
            check_finite("model.critic", lr=self.lr)
            if self.lr <= 0:
                raise InputError(f"`model.critic.lr` must be above 0, or null for the policy's, got {self.lr}.")
        for name in ("model", "lora"):
            if self.shares_trunk and getattr(self, name) is not None:
                raise InputError(
                    f"`model.critic.{name}` has no effect where `model.critic.shares_trunk` is true: the values then "
                    "come from the policy's own hidden states. Leave one of them out."
                )
        if self.lora is not None and self.lora.base_dtype is not None:
            raise InputError(
                "`model.critic.lora.base_dtype`: critics train on a base in `model.dtype`. Set it to null."
            )
        if self.lora is not None and self.lora.dropout > 0:
            raise InputError(
                f"`model.critic.lora.dropout` is {self.lora.dropout}: the critic must give the values that advantages "
                "were computed with. Set it to 0."
            )


def record_critic(settings: Critic) -> dict[str, Any]:
    """The settings that a run records."""
    return {**vars(settings), "lora": None if settings.lora is None else record_settings(settings.lora)}
