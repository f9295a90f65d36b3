"""Half-precision copies of a model's float32 weights, for `bf16-mixed` on devices that hold all of them."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


class WorkingCopy:
    """A twin of a model whose weights are copies in another dtype, cast once after every change of the model's own.

    The model's own weights stay what the optimizer, checkpoints and callbacks see; gradients reach them through the
    copies, in their own dtype, so that micro-batches are summed in float32. Unlike autocast this casts nothing in a
    micro-batch, and activations between layers are in half precision too.

    Args:
        model: Holds the weights.
        dtype: Of the copies.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self._twin: nn.Module | None = None
        self._noted: list[tuple[int, int]] = []
        self._training: bool | None = None

    def expire(self) -> None:
        """Cast anew before the next use: optimizers may change weights without torch's knowledge."""
        self._noted = []

    def twin(self) -> Any:
        """The twin, ready for a forward pass; under gradients its weights lead back to the model's own."""
        if self._twin is None or self._moved():
            self._build()
        assert self._twin is not None
        if self.model.training != self._training:
            self._training = self.model.training
            self.expire()
        self._refresh()
        for own, other in zip(self.model.modules(), self._twin.modules(), strict=True):
            other.training = own.training
            if "_disable_adapters" in vars(own):  # peft's
                other._disable_adapters = own._disable_adapters
        used: Mapping[int, Tensor] = {
            key: _Use.apply(own, copy) if torch.is_grad_enabled() and own.requires_grad else copy
            for key, (own, copy) in self._copies.items()
        }
        for parameters, name, key in self._places:
            parameters[name] = used[key]
        return self._twin

    def _moved(self) -> bool:
        return any(own.device != copy.device for own, copy in self._copies.values())

    def _build(self) -> None:
        """The twin's structure is the model's; buffers and weights that keep their dtype are shared."""
        own = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        self._twin = deepcopy(self.model, dict(own))
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._places: list[tuple[dict[str, Any], str, int]] = []
        for module in self._twin.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or parameter.dtype != torch.float32:
                    continue
                if id(parameter) not in self._copies:
                    copy = torch.empty_like(parameter, dtype=self.dtype, requires_grad=False)
                    self._copies[id(parameter)] = (parameter, copy)
                self._places.append((module._parameters, name, id(parameter)))
        self.expire()

    @torch.no_grad()
    def _refresh(self) -> None:
        if not self._copies:
            return
        now = [(own._version, own.data_ptr()) for own, _ in self._copies.values()]
        if now != self._noted:
            own, copies = zip(*self._copies.values(), strict=True)
            torch._foreach_copy_(list(copies), list(own))
            self._noted = now

    def __deepcopy__(self, memo: dict[int, Any]) -> "WorkingCopy":
        return WorkingCopy(deepcopy(self.model, memo), self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return WorkingCopy, (self.model, self.dtype)


class _Use(torch.autograd.Function):
    """Gives a copy for a weight, and the weight the copy's gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, copy: Tensor) -> Tensor:
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.float(), None
