"""The protocol of LightningModules that train on rounds."""

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

    Its `training_step` takes a `GroupBatch`. Checkpoints hold the weights of its `policy.lm` under that name. If it has
    an attribute `computes_ahead` that is true, it also gets groups above the token budget in parts, and must do what
    `GroupBatch.ahead` asks for, as `RebelModule` does.

    Attributes:
        batch_type: `GroupBatch`.
        source: The initial model.
        reference_source: The fixed reference; the same object as `source` if it is the initial model.
        loss: The loss.
        needs: Names of the log-probs that it needs of a round, for `loss` and for a KL penalty. Any other name is that
            of a method of the module, `(PackedBatch, temperature) -> values of the M target tokens, shape (M,)`, such
            as a critic's: computed once before a round trains, without gradient, and stored.
        kl_coef: Weight of the KL penalty in the rewards, reward units per nat.
        has_reference: Whether the KL divergence from a reference can be computed: the module has one, or adapters.
        dtype_name: Dtype of the trained weights.
        policy: The module that computes log-probs; None until `configure_model`.
        first_logratio: Mean absolute log-ratio to pi_old per token, in nats, after the first update of a round; None
            after other updates.
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
        """The initial policy, adapters included."""

    def load(self, source: ModelSource) -> Any:
        """Load a causal LM with the dtype and the kernels of this run."""

    def unit(self, lm: Any) -> Any:
        """Wrap a causal LM in a module that computes log-probs: see `PolicyLM.forward`."""

    def load_reference(self) -> Callable[..., Tensor]:
        """Load the fixed reference, which is called like the policy. The caller releases it after use."""

    def weights(self) -> Weights:
        """The weights of the policy under their Hugging Face names, tied ones included, adapters merged."""

    def training_settings(self) -> Mapping[str, Any]:
        """The settings that training on a round depends on, for the manifest."""

    def round_summary(self) -> Mapping[str, Any]:
        """Mean `loss` and `kl` over the training on the round, None if unknown; and more for its manifest."""


def find_missing_members(module: object, protocol: type = PolicyModule) -> list[str]:
    """Names of the members of a protocol that a module lacks.

    (`isinstance` does not find the submodules of a `torch.nn.Module`.)
    """
    if not isinstance(module, L.LightningModule):
        return ["LightningModule"]
    kinds = [kind for kind in protocol.__mro__ if kind not in (Protocol, Generic, object)]
    members = {name for kind in kinds for name in (*kind.__annotations__, *vars(kind)) if not name.startswith("_")}
    return sorted(name for name in members if not hasattr(module, name))


def is_policy_module(module: object) -> TypeGuard[PolicyModule]:
    """Whether a module has all members of `PolicyModule`, whatever its class."""
    return not find_missing_members(module)


def as_lightning(module: PolicyModule) -> L.LightningModule:
    """The same object, typed as a LightningModule: a protocol can't inherit from a class."""
    assert isinstance(module, L.LightningModule)
    return module
