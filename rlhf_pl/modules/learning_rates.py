"""Learning rates that suit a model's size: what `lr: auto` stands for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from rlhf_pl.utils.errors import InputError

Stage = Literal["policy", "sft", "reward_model"]

# The rate of a model with a billion parameters, the power of the size that it falls with, and the largest rate, which
# small models have. docs/tuning.md has the trials, and the table that follows from them.
_AT_A_BILLION: dict[Stage, float] = {"policy": 4e-6, "sft": 4e-5, "reward_model": 2e-5}
_POWER: dict[Stage, float] = {"policy": 1.0, "sft": 2 / 3, "reward_model": 2 / 3}
_LARGEST: dict[Stage, float] = {"policy": 3e-5, "sft": 2e-4, "reward_model": 1e-4}
LORA_FACTOR = 10.0  # adapters take a higher rate than all weights of the same model


def suitable_rate(parameters: int, stage: Stage, lora: bool = False) -> float:
    """The peak learning rate of AdamW for a model, to two digits.

    Args:
        parameters: Number of the model's parameters, also where adapters train instead of them.
        stage: What is trained: a policy on rewards, a policy on responses, or a reward model.
        lora: Whether low-rank adapters train.
    """
    rate = min(_LARGEST[stage], _AT_A_BILLION[stage] * (max(1, parameters) / 1e9) ** -_POWER[stage])
    return float(f"{rate * (LORA_FACTOR if lora else 1.0):.1e}")


_current: ContextVar[Callable[[], float] | None] = ContextVar("suitable rate", default=None)


@contextmanager
def automatic_rate(rate: Callable[[], float]) -> Iterator[None]:
    """Make `auto` stand for what `rate` returns in optimizers that are made inside."""
    token = _current.set(rate)
    try:
        yield
    finally:
        _current.reset(token)


def resolve_rate(lr: float | Literal["auto"]) -> float:
    """A learning rate as a number.

    Raises:
        InputError: It is auto, and no module of this package makes the optimizer.
    """
    if lr != "auto":
        return lr
    rate = _current.get()
    if rate is None:
        raise InputError(
            "`lr` of rlhf_pl.optim.AdamW is auto, which only the modules of rlhf_pl can resolve, as they know the "
            "model's size. Give a number."
        )
    return rate()


def is_automatic(optimizer: Any) -> bool:
    """Whether the optimizer's learning rate was `auto`."""
    return getattr(optimizer, "has_automatic_rate", False)
