"""Half-precision copies of a model's float32 weights, for `bf16-mixed` on devices that hold all of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


class WorkingCopy:
    """A twin of a model whose weights are copies in another dtype, cast once after every change of the model's own.

    The model's own weights stay what the optimizer, checkpoints and callbacks see; gradients reach them through the
    copies, in their own dtype, so that micro-batches are summed in float32. Unlike autocast this casts nothing in a
    micro-batch, and activations between layers are in half precision too.

    Not all changes of weights show (averages of weights and some optimizers write past torch's counters), so every pass
    without gradients casts anew but inside `steady`; of passes with gradients the first after a step of the optimizer,
    or after evaluation, does.

    Args:
        model: Holds the weights.
        dtype: Of the copies.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of a weight: itself and its copy
        self._twins: dict[bool, _Twin] = {}  # for passes with gradients, which may be recomputed later, and without
        self._built_of: list[Any] = []
        self._noted: list[tuple[int, int]] = []
        self._steady = self._expired = False

    def expire(self) -> None:
        """Cast anew before the next use."""
        self._expired = True

    @contextmanager
    def steady(self) -> Iterator[None]:
        """In which the weights do not change, so that passes without gradients cast once."""
        self.expire()
        self._steady = True
        try:
            yield
        finally:
            self._steady = False
            self.expire()

    def twin(self) -> Any:
        """The twin, ready for a forward pass; under gradients its weights lead back to the model's own."""
        gradients = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.no_grad():  # what is made here is used in training as well
            if self._built_of != (now := self._structure()):
                self._make_copies()
                self._built_of = now
            if not gradients and not self._steady:
                self.expire()
            self._refresh()
            if not gradients and not self._steady:
                self.expire()  # for the next pass with gradients too
            if gradients not in self._twins:
                self._twins[gradients] = _Twin(self.model, self._copies)
        return self._twins[gradients].use(gradients)

    def _structure(self) -> list[Any]:
        """What a twin is built of: modules, weights, where they are, and hooks."""
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
        self._twins, self._noted = {}, []

    def _refresh(self) -> None:
        if not self._copies:
            return
        now = [(own._version, own.data_ptr()) for own, _ in self._copies.values()]
        if now == self._noted and not self._expired:
            return
        own, copies = zip(*self._copies.values(), strict=True)
        if now == self._noted:  # nothing to see: a backward pass that is still to come must not take it for a change
            copies = tuple(copy.data for copy in copies)
        torch._foreach_copy_(list(copies), list(own))
        self._noted, self._expired = now, False

    def __deepcopy__(self, memo: dict[int, Any]) -> "WorkingCopy":
        return WorkingCopy(deepcopy(self.model, memo), self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return WorkingCopy, (self.model, self.dtype)


class _Twin:
    """The structure of a model; buffers and weights that keep their dtype are shared with it."""

    def __init__(self, model: nn.Module, copies: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.model, self.copies = model, copies
        shared = {id(t): t for m in model.modules() for s in (m._parameters, m._buffers) for t in s.values()}
        self.module = deepcopy(model, {key: t for key, t in shared.items() if t is not None})
        self.places: list[tuple[dict[str, Any], str, int]] = [
            (m._parameters, name, id(p)) for m in self.module.modules() for name, p in m._parameters.items()
            if id(p) in copies
        ]  # fmt: skip

    def use(self, gradients: bool) -> nn.Module:
        """The twin in the model's present modes."""
        for own, other in zip(self.model.modules(), self.module.modules(), strict=True):
            other.training = own.training
            if "_disable_adapters" in vars(own):  # peft's
                other._disable_adapters = own._disable_adapters
        used = {
            key: _Use.apply(own, copy) if gradients and own.requires_grad else copy
            for key, (own, copy) in self.copies.items()
        }
        for parameters, name, key in self.places:
            parameters[name] = used[key]
        return self.module


class _Use(torch.autograd.Function):
    """Gives a copy for a weight, and the weight the copy's gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, copy: Tensor) -> Tensor:
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.float(), None
