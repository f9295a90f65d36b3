"""Which of many tensors holds something that is not a finite number."""

from collections.abc import Iterable

import torch
from torch import Tensor


def first_not_finite(tensors: Iterable[tuple[str, Tensor]], largest: float = torch.finfo().max) -> str:
    """The name of the first tensor that holds a NaN, or a number beyond +-`largest`; empty if there is none."""
    return next(iter(not_finite(tensors, largest)), "")


@torch.no_grad()
def not_finite(tensors: Iterable[tuple[str, Tensor]], largest: float = torch.finfo().max) -> list[str]:
    """The names of the tensors that hold a NaN, or a number beyond +-`largest`.

    Each tensor is read once, where it is, and the host waits for a device once. What holds no floats, or has no memory
    behind it, is passed over.
    """
    names, peaks = [], []
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta and tensor.numel():
            plain = tensor if tensor.element_size() > 1 else tensor.float()  # float8 has no minimum
            names.append(name)
            peaks.append(torch.stack(plain.aminmax()).float())  # a NaN is the minimum and the maximum
    if not names:
        return []
    found = torch.stack([peak.to(peaks[0].device, non_blocking=True) for peak in peaks]).abs() <= largest
    return [name for name, good in zip(names, found.all(1).tolist(), strict=True) if not good]
