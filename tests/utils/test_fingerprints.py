"""The fingerprint of weights."""

import pytest
import torch

from rlhf_pl.utils.fingerprints import weights_fingerprint


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(300, 64, generator=generator),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "empty": torch.zeros(0),
    }


def test_it_does_not_depend_on_order_or_memory_layout(weights: dict[str, torch.Tensor]) -> None:
    found = weights_fingerprint(weights.items())
    assert weights_fingerprint(reversed(weights.items())) == found
    strided = torch.empty(64, 300).T.copy_(weights["a"])
    odd = torch.cat([torch.zeros(1, dtype=torch.bfloat16), weights["b"]])[1:]  # not aligned to 8 bytes
    assert weights_fingerprint((weights | {"a": strided, "b": odd}).items()) == found


@pytest.mark.parametrize("change", ["smallest step of one weight", "two rows swapped", "two weights swapped"])
def test_it_changes_with_any_change(weights: dict[str, torch.Tensor], change: str) -> None:
    a = weights["a"].clone()
    if change == "two rows swapped":
        a[[3, 4]] = a[[4, 3]]
    elif change == "two weights swapped":
        a[0, 0], a[5, 7] = weights["a"][5, 7], weights["a"][0, 0]
    else:
        a[2, 3] = torch.nextafter(a[2, 3], torch.tensor(9.0))
    assert weights_fingerprint((weights | {"a": a}).items()) != weights_fingerprint(weights.items())


def test_it_changes_with_the_names(weights: dict[str, torch.Tensor]) -> None:
    renamed = {"c" if name == "a" else name: tensor for name, tensor in weights.items()}
    assert weights_fingerprint(renamed.items()) != weights_fingerprint(weights.items())
