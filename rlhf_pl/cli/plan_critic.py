"""The memory and the time of PPO's critic, for `rlhf-pl plan`."""

from dataclasses import dataclass
from typing import Any

from rlhf_pl.models.critic_options import Critic
from rlhf_pl.models.footprint import DTYPE_BYTES, Kernels, ModelSize, activation_bytes, classifier_size, head_size
from rlhf_pl.models.source import ModelSource


@dataclass(frozen=True)
class PlannedCritic:
    """A critic, from its settings and the configs of the models.

    Args:
        size: Its own parameters: of a model with its head, or of the head on the policy.
        source: Its model; None for a head on the policy.
        is_whole: Whether all its weights train.
        width: Bytes of a weight.
    """

    size: ModelSize
    source: ModelSource | None
    is_whole: bool
    width: int

    def held(self, shards: int, copies: bool) -> dict[str, int]:
        """Bytes per device in all phases by part.

        Args:
            shards: Devices that the weights are spread over.
            copies: Whether there is a copy of the weights in half precision.
        """
        return {
            "critic parameters": (self.width + 2 * copies) * self.size.total // shards,
            "critic optimizer": 2 * self.width * self.size.trainable // shards,
        }

    def training(self, shards: int, sums: int, rows: int, tokens: int, kernels: Kernels, again: bool) -> dict[str, int]:
        """Further bytes per device of a training step by part.

        Args:
            shards: Devices that the weights are spread over.
            sums: Copies of the gradients.
            rows: Rows of a micro-batch.
            tokens: Tokens of a row.
            kernels: Kernels of the policy, which the critic has too.
            again: Whether activations are computed again in the backward pass.
        """
        gradients = {"critic gradients": self.width * self.size.trainable // shards * sums}
        if self.source is None:
            return gradients
        return gradients | {"critic activations": activation_bytes(self.source.config, rows, tokens, kernels, again)}

    def gathered(self, compute: int) -> int:
        """Bytes of the gathered units of a sharded critic, of `compute` bytes a weight."""
        return 0 if self.source is None else compute * (self.size.rest + 2 * self.size.layer)

    def checkpoint(self) -> int:
        """Bytes in a checkpoint."""
        return self.width * (self.size.total + 2 * self.size.trainable)

    def flops(self, checkpointing: bool, ahead: int) -> int:
        """FLOPs of the training on a token of a row.

        Args:
            checkpointing: Whether activations are computed again in the backward pass.
            ahead: Passes without gradient ahead of an update.
        """
        if self.source is None:  # the head alone: the rest is the policy's
            return 6 * self.size.total
        return ((6 if self.is_whole else 4) + 2 * checkpointing + 2 * ahead) * self.size.total

    def flops_of_old_values(self, policy: int) -> int:
        """FLOPs of the values before a round trains for a token of a row; `policy` is the policy's parameters."""
        return 2 * (policy if self.source is None else self.size.total)


def plan_critic(module: Any) -> PlannedCritic | None:
    """The critic of a module; None for one without."""
    options = getattr(module, "critic_options", None)
    if not isinstance(options, Critic):
        return None
    width = DTYPE_BYTES[module.dtype_name]
    if options.shares_trunk:
        return PlannedCritic(head_size(module.source.config), None, True, width)
    source = module.critic_source
    return PlannedCritic(classifier_size(source, options.lora), source, options.lora is None, width)
