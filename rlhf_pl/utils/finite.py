"""Finds tensors with values that are not finite."""

from collections.abc import Iterable

import torch
from torch import Tensor


def find_first_nonfinite(tensors: Iterable[tuple[str, Tensor]], largest: float = torch.finfo().max) -> str:
    """Name of the first tensor with a NaN or an absolute value above `largest`; empty if there is none."""
    return next(iter(find_nonfinite(tensors, largest)), "")


@torch.no_grad()
def find_nonfinite(tensors: Iterable[tuple[str, Tensor]], largest: float = torch.finfo().max) -> list[str]:
    """Names of the tensors with a NaN or an absolute value above `largest`.

    Reads each tensor once, on its device, and waits for a device once. Skips empty tensors, those on the meta device,
    and those of integers.
    """
    names, peaks = [], []
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta and tensor.numel():
            values = tensor if tensor.element_size() > 1 else tensor.float()  # float8 does not implement aminmax
            names.append(name)
            peaks.append(torch.stack(values.aminmax()).float())  # a NaN is the minimum and the maximum
    if not names:
        return []
    in_range = torch.stack([peak.to(peaks[0].device, non_blocking=True) for peak in peaks]).abs() <= largest
    return [name for name, good in zip(names, in_range.all(1).tolist(), strict=True) if not good]
