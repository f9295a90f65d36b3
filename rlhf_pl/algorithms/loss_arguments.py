"""Checks of the arguments of losses: options of their classes, and tensors and numbers of their functions."""

import math

from torch import Tensor

from rlhf_pl.utils.errors import InputError


def check_positive(**options: float) -> None:
    """Raise InputError for the first option of `model.loss` that is not positive and finite."""
    for name, value in options.items():
        if not 0 < value < math.inf:
            raise InputError(f"`model.loss.{name}` must be positive and finite, got {value}.")


def check_not_negative(**options: float) -> None:
    """Raise InputError for the first option of `model.loss` that is negative or not finite."""
    for name, value in options.items():
        if not 0 <= value < math.inf:
            raise InputError(f"`model.loss.{name}` must be 0 or more and finite, got {value}.")


def check_label_smoothing(value: float) -> None:
    """Raise InputError unless a label smoothing is in [0, 0.5): at 0.5 labels say nothing."""
    if not 0 <= value < 0.5:
        raise InputError(f"`model.loss.label_smoothing` must be at least 0 and below 0.5, got {value}.")


def check_tensors(*values: Tensor) -> None:
    """Raise ValueError unless all tensors have one shape (B,)."""
    shapes = [tuple(value.shape) for value in values]
    if len(shapes[0]) != 1 or len(set(shapes)) != 1:
        raise ValueError(f"The arguments of a loss must have one shape (B,), got {shapes}.")
