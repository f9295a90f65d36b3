"""What a LightningModule must have to take part in rounds."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeGuard

import lightning as L
import torch
from torch import Tensor

from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.distributed.gather_weights import Weights
from rlhf_pl.models.source import ModelSource


class PolicyModule(Protocol):
    """A LightningModule whose policy samples the rounds that it trains on.

    Its `training_step` gets a `GroupBatch`. Checkpoints hold the weights of its `policy.lm` under that name.

    Attributes:
        batch_type: `GroupBatch`.
        source: The model that the run starts from.
        reference_source: The fixed reference; the same object where it is the starting model.
        loss: What it trains with.
        needs: The log-probs that it takes of a round: those that `loss` needs, and those of a KL penalty.
        kl_coef: Weight of the KL penalty in the rewards, reward units per nat.
        has_reference: Whether the distance to a reference can be measured: it has one, or adapters.
        dtype_name: Dtype of the trained weights.
        policy: The unit that gives log-probs; None until `configure_model`.
        first_logratio: Mean absolute log-ratio to pi_old a token in a round's first update, right after it, nats; None
            after the others.
    """

    batch_type: ClassVar[type]
    source: ModelSource
    reference_source: ModelSource
    loss: PolicyLoss
    needs: Collection[str]
    kl_coef: float
    dtype_name: Any
    policy: Any
    first_logratio: float | None

    @property
    def has_reference(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    def build_lm(self, read_weights: bool = True) -> Any:
        """The policy as the run starts from it, adapters included."""

    def load(self, source: ModelSource) -> Any:
        """A causal LM with the dtype and the kernels of this run."""

    def unit(self, lm: Any) -> Any:
        """A causal LM as the module that gives log-probs: see `PolicyLM.forward`."""

    def load_reference(self) -> Callable[..., Tensor]:
        """The fixed reference, to be called as the policy is. The caller drops it after use."""

    def weights(self) -> Weights:
        """The weights of the policy under their Hugging Face names, tied ones included, adapters merged."""

    def training_settings(self) -> Mapping[str, Any]:
        """What the training on a round depends on, for the manifest."""

    def round_summary(self) -> Mapping[str, float | None]:
        """Mean `loss` and `kl` over all that the round has trained on; None for what is not known."""


def lacking(module: object, protocol: type = PolicyModule) -> list[str]:
    """What a module lacks of a protocol. (`isinstance` does not find the submodules of a `torch.nn.Module`.)"""
    if not isinstance(module, L.LightningModule):
        return ["LightningModule"]
    kinds = [kind for kind in protocol.__mro__ if kind not in (Protocol, Generic, object)]
    members = {name for kind in kinds for name in (*kind.__annotations__, *vars(kind)) if not name.startswith("_")}
    return sorted(name for name in members if not hasattr(module, name))


def is_policy_module(module: object) -> TypeGuard[PolicyModule]:
    """Whether a module takes part in rounds: what counts is what it has, not its class."""
    return not lacking(module)


def as_lightning(module: PolicyModule) -> L.LightningModule:
    """The same object: a protocol can't say that it is a LightningModule too."""
    assert isinstance(module, L.LightningModule)
    return module
