"""Rounding to bfloat16 that follows small updates."""

from pathlib import Path

import pytest
import torch

from rlhf_pl.models.compute import Compute
from rlhf_pl.models.packed_batch import PrefixGroup, pack
from rlhf_pl.models.policy import PolicyLM, load_lm
from rlhf_pl.models.rounding import round_into, round_to
from rlhf_pl.models.source import ModelSource

SHAPES = [(), (0,), (7,), (65521,), (300, 500), (3, 65521), (1000, 331)]


def exact(*shape: int) -> torch.Tensor:
    """Numbers that bfloat16 can represent."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().float()


@pytest.mark.parametrize("shape", SHAPES)
def test_each_weight_becomes_one_of_its_neighbours(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    weights = torch.randn(shape)
    rounded = round_to(weights, torch.bfloat16)
    bits = weights.view(torch.int32) & ~0xFFFF  # towards 0
    lower, upper = bits.view(torch.float32), (bits + 0x10000).view(torch.float32)
    assert rounded.shape == shape
    assert ((rounded.float() == lower) | (rounded.float() == upper)).all()
    assert torch.equal(round_to(rounded.float(), torch.bfloat16), rounded)
    assert torch.equal(round_to(weights, torch.bfloat16), rounded)


def test_the_mean_is_exact_where_the_nearest_number_is_always_the_old_one() -> None:
    weights = exact(400_000).abs() + 0.5
    moved = weights.bfloat16().float() * (1 + 2.0**-11)
    change = (moved - weights.bfloat16().float()).mean()
    assert torch.equal(moved.bfloat16(), weights.bfloat16())
    assert ((round_to(moved, torch.bfloat16).float() - weights.bfloat16().float()).mean() / change - 1).abs() < 0.02
    for sign in (-1, 1):
        assert torch.equal(round_to(sign * exact(1000), torch.bfloat16).float(), sign * exact(1000))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000, -0x800000])
def test_nan_and_infinity_stay(bits: int) -> None:
    weights = torch.ones(70_000)
    weights[-3:] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    rounded = round_to(weights, torch.bfloat16)
    assert torch.equal(rounded.isnan(), weights.isnan())
    assert torch.equal(rounded.isinf(), weights.isinf())
    assert torch.equal(rounded[:-3], torch.ones(69_997).bfloat16())


def test_strided_tensors_and_other_dtypes() -> None:
    torch.manual_seed(1)
    weights = torch.randn(40, 30)
    target = torch.empty(30, 40, dtype=torch.bfloat16).T
    round_into(target, weights)
    assert torch.equal(target, round_to(weights, torch.bfloat16))
    assert torch.equal(round_to(weights.T, torch.bfloat16), round_to(weights.T.contiguous(), torch.bfloat16))
    assert torch.equal(round_to(weights, torch.float16), weights.half())
    assert round_to(weights, torch.float32) is weights
    assert torch.equal(round_to(weights.double(), torch.bfloat16), weights.double().bfloat16())


def test_a_policy_with_copies_follows_an_update_below_their_resolution(llama: Path) -> None:
    """From bfloat16 weights, a step that no nearest number shows: log-probs change as those of float32 weights do."""
    source, rows = ModelSource(str(llama)), pack([PrefixGroup([5, 6, 7, 8], ([9, 10, 11, 40, 41, 42, 43, 44],))])
    mixed = PolicyLM(load_lm(source, compute=Compute(dtype=torch.bfloat16)), compute=Compute(dtype=torch.bfloat16))
    plain = PolicyLM(load_lm(source))
    with torch.no_grad():
        for policy in (mixed, plain):
            for weight in policy.parameters():
                weight.copy_(weight.bfloat16().float())
    before = [policy(**rows.inputs()).sum().detach() for policy in (mixed, plain)]
    plain(**rows.inputs()).sum().backward()
    gradients = [weight.grad for weight in plain.parameters()]
    with torch.no_grad():
        for policy in (mixed, plain):
            for weight, gradient in zip(policy.parameters(), gradients, strict=True):
                assert gradient is not None
                weight += 2.0**-10 * weight.abs() * gradient.sign()
                assert torch.equal(weight.bfloat16(), (weight - 2.0**-10 * weight.abs() * gradient.sign()).bfloat16())
    change, expected = (
        policy(**rows.inputs()).sum().item() - start.item()
        for policy, start in zip((mixed, plain), before, strict=True)
    )
    assert change == pytest.approx(expected, rel=0.35)
