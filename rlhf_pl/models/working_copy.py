"""Half-precision copies of a model's float32 weights, for `bf16-mixed` on devices that hold all of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pl.models.rounding import round_into


class WorkingCopy:
    """A copy of a model with weights in another dtype, cast once after every change of the model's weights.

    Optimizer, checkpoints and callbacks see only the model's own weights. Gradients reach them through the copies, in
    the own weights' dtype, so that micro-batches are summed in float32. Unlike autocast, this casts nothing in a
    micro-batch, and activations between layers are in half precision too. `round_into` makes bfloat16 copies follow
    updates that are smaller than the distance between bfloat16 numbers.

    Some changes of weights are not visible: weight averages and some optimizers bypass torch's version counters.
    Therefore every pass without gradients casts again, except inside `weights_unchanged`. Of passes with gradients, the
    first one after an optimizer step or an evaluation casts.

    Args:
        model: Holds the weights.
        dtype: Dtype of the copies.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # id of a weight -> the weight and its copy
        # separate for passes with gradients, which may be recomputed later, and without
        self._modules: dict[bool, _ModelCopy] = {}
        self._built_from: list[Any] = []
        self._seen_versions: list[tuple[int, int]] = []
        self._frozen = self._invalid = False

    def invalidate(self) -> None:
        """Cast again before the next use."""
        self._invalid = True

    @contextmanager
    def weights_unchanged(self) -> Iterator[None]:
        """The weights do not change inside this context, so that passes without gradients cast only once."""
        self.invalidate()
        self._frozen = True
        try:
            yield
        finally:
            self._frozen = False
            self.invalidate()

    def prepare_module(self) -> Any:
        """The copy, ready for a forward pass. With gradients enabled, they flow to the model's own weights."""
        gradients = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.no_grad():  # training uses these tensors too
            if self._built_from != (now := self._structure()):
                self._make_copies()
                self._built_from = now
            if not gradients and not self._frozen:
                self.invalidate()
            self._refresh()
            if not gradients and not self._frozen:
                self.invalidate()  # for the next pass with gradients too
            if gradients not in self._modules:
                self._modules[gradients] = _ModelCopy(self.model, self._copies)
        return self._modules[gradients].use(gradients)

    def _structure(self) -> list[Any]:
        """Everything that a copy is built from: modules, weights with device and dtype, and hooks."""
        found: list[Any] = []
        for module in self.model.modules():
            weights = [(id(p), p.device, p.dtype) for p in module._parameters.values() if p is not None]
            found.append((id(module), weights, [*module._forward_hooks, *module._forward_pre_hooks]))
        return found

    def _make_copies(self) -> None:
        weights = {id(p): p for m in self.model.modules() for p in m._parameters.values() if p is not None}
        self._copies = {
            key: (own, torch.empty_like(own, dtype=self.dtype, requires_grad=False))
            for key, own in weights.items()
            if own.dtype == torch.float32
        }
        self._modules, self._seen_versions = {}, []

    def _refresh(self) -> None:
        if not self._copies:
            return
        now = [(own._version, own.data_ptr()) for own, _ in self._copies.values()]
        if now == self._seen_versions and not self._invalid:
            return
        for own, copy in self._copies.values():
            # perhaps unchanged: a pending backward pass must not see a new version
            target = copy.data if now == self._seen_versions else copy
            if self.dtype == torch.bfloat16:
                round_into(target, own)
            else:
                target.copy_(own)
        self._seen_versions, self._invalid = now, False

    def __deepcopy__(self, memo: dict[int, Any]) -> "WorkingCopy":
        return WorkingCopy(deepcopy(self.model, memo), self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return WorkingCopy, (self.model, self.dtype)


class _ModelCopy:
    """A copy of a model's modules that shares its buffers and all weights that keep their dtype."""

    def __init__(self, model: nn.Module, copies: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.model, self.copies = model, copies
        shared = {id(t): t for m in model.modules() for s in (m._parameters, m._buffers) for t in s.values()}
        self.module = deepcopy(model, {key: t for key, t in shared.items() if t is not None})
        self.places: list[tuple[dict[str, Any], str, int]] = [
            (m._parameters, name, id(p)) for m in self.module.modules() for name, p in m._parameters.items()
            if id(p) in copies
        ]  # fmt: skip

    def use(self, gradients: bool) -> nn.Module:
        """The copy in the model's current train and adapter modes."""
        for own, other in zip(self.model.modules(), self.module.modules(), strict=True):
            other.training = own.training
            if "_disable_adapters" in vars(own):  # peft's
                other._disable_adapters = own._disable_adapters
        used = {
            key: _UseCopy.apply(own, copy) if gradients and own.requires_grad else copy
            for key, (own, copy) in self.copies.items()
        }
        for parameters, name, key in self.places:
            parameters[name] = used[key]
        return self.module


class _UseCopy(torch.autograd.Function):
    """Replaces a weight by its copy, and passes the copy's gradient to the weight."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, copy: Tensor) -> Tensor:
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.float(), None


def working_copies(module: nn.Module) -> list[WorkingCopy]:
    """The working copies of the models inside a module."""
    return [copy for part in module.modules() if isinstance(copy := getattr(part, "copy", None), WorkingCopy)]
