"""Rounding of weights to bfloat16 in which small updates are not lost."""

import random
from functools import lru_cache

import torch
from torch import Tensor

_NUMBERS = 65521  # a prime, so that they do not repeat with the rows of a weight
_ROWS_ON_CPU = 4  # of numbers at a time: a megabyte, which stays in the processor's cache
_ROWS = 512  # on GPUs: 128 MiB, where the sums of a large embedding would need gigabytes


def round_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype: float32 is rounded to bfloat16 by `round_into`, other dtypes as torch does it."""
    if tensor.dtype != torch.float32 or dtype != torch.bfloat16:
        return tensor.to(dtype)
    rounded = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    round_into(rounded, tensor)
    return rounded


@torch.no_grad()
def round_into(target: Tensor, source: Tensor) -> None:
    """Round to bfloat16, each weight up or down with a probability that gives the exact value on average.

    Most checkpoints are in bfloat16, where neighbours differ by 2^-8 to 2^-7 of their size. The nearest of them to a
    weight that has moved by less than half of that is the old weight: a policy computed with such copies would stand
    still while its float32 weights move, and then jump. Here a weight is rounded up if the part that bfloat16 cuts off
    exceeds a number that is fixed for its place in the tensor: equal weights give equal copies in every process, exact
    weights stay as they are, and of weights that moved by a hundredth of the gap one in a hundred moves by all of it.
    This is stochastic rounding (Gupta et al. 2015, https://arxiv.org/abs/1502.02551) with the same random numbers
    every time.

    Args:
        target: bfloat16, of the shape of `source`.
        source: float32.
    """
    if not target.is_contiguous():
        target.copy_(round_to(source, target.dtype))
        return
    bits = source.detach().contiguous().view(-1).view(torch.int32)
    out = target.detach().view(-1).view(torch.int16)
    # NaN plus a number could become another value, so that tensors with NaN get none
    numbers = _numbers(source.device) * source.detach().sum().isfinite().int()
    whole = len(bits) // _NUMBERS
    step = _ROWS_ON_CPU if source.device.type == "cpu" else _ROWS
    for row in range(0, whole, step):
        part = slice(row * _NUMBERS, min(row + step, whole) * _NUMBERS)
        out[part].view(-1, _NUMBERS).copy_(_upper_halves(bits[part].view(-1, _NUMBERS) + numbers))
    rest = slice(whole * _NUMBERS, None)
    out[rest].copy_(_upper_halves(bits[rest] + numbers[: len(bits[rest])]))


def _upper_halves(bits: Tensor) -> Tensor:
    """The upper 16 bits of 32, shape (..., N)."""
    return bits.view(torch.int16)[..., 1::2] if _LITTLE_ENDIAN else bits.view(torch.int16)[..., 0::2]


_LITTLE_ENDIAN = torch.ones(1, dtype=torch.int32).view(torch.int16)[0].item() == 1


@lru_cache
def _numbers(device: torch.device) -> Tensor:
    """0 to 65535 in random order, equally spaced, shape (_NUMBERS,), int32."""
    numbers = [index * 65536 // _NUMBERS for index in range(_NUMBERS)]
    random.Random(0).shuffle(numbers)
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.int32, device=device)
