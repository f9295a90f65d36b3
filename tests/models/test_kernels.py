"""GPU kernels on a CPU, as far as Triton's interpreter or a replacement of one call can run them."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_pl.models import shared_prefix_attention as prefix_attention
from rlhf_pl.models.logprobs import Head, gather_logps, linear_logps, product
from rlhf_pl.models.packed_layout import Layout
from rlhf_pl.models.shared_prefix_attention import _attention

LENGTHS = ((9, 3, 4, 5), (1, 2), (0, 6), (7, 1, 1))
HEADS = {"heads": 4, "kv_heads": 2, "size": 8}


def states(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random queries, keys and values for `LENGTHS`."""
    torch.manual_seed(0)
    count = sum(map(sum, LENGTHS))
    shapes = [(1, HEADS[kind], count, HEADS["size"]) for kind in ("heads", "kv_heads", "kv_heads")]
    return [(2 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]


def by_mask(query: Tensor, key: Tensor, value: Tensor, window: int | None, cap: float | None, sinks: Any) -> Tensor:
    """Attention with an explicit mask over the flat row, float64, shape (1, N, heads, D)."""
    query, key, value = (t.double() for t in (query, key, value))
    key, value = (t.repeat_interleave(2, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * HEADS["size"] ** -0.5
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    count = torch.arange(query.shape[2])
    scores = scores.masked_fill(~Layout(LENGTHS).mask_function(window)(0, 0, count[:, None], count[None]), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(1, -1, len(count), 1)], -1)
    return (scores.softmax(-1)[..., : len(count)] @ value).transpose(1, 2)


def assert_same_with_gradients(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Assert that two results of the same inputs are equal, and their gradients too, with random factors."""
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    factors = torch.randn(found.shape)
    ours = torch.autograd.grad((found * factors).sum(), inputs)
    theirs = torch.autograd.grad((expected * factors).sum(), inputs)
    for gradient, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-4, rtol=1e-4)


def varlen_by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_query: int,
    max_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """The documented result of `torch.nn.attention.varlen.varlen_attn`, which only runs on GPUs."""
    assert window_size[1] == 0
    assert enable_gqa
    found = []
    for start, end, first, last in zip(
        query_offsets[:-1], query_offsets[1:], key_offsets[:-1], key_offsets[1:], strict=True
    ):
        assert end - start <= max_query
        assert last - first <= max_key
        q, k, v = query[start:end], *(t[first:last].repeat_interleave(2, dim=1) for t in (key, value))
        rows = torch.arange(last - first - (end - start), last - first)[:, None]
        columns = torch.arange(last - first)
        seen = columns <= rows if window_size[0] < 0 else (columns <= rows) & (columns >= rows - window_size[0])
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        found.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(found)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("special", [{}, {"softcap": 1.5}, {"s_aux": torch.linspace(-1, 2, 4)}])
def test_attention_of_prefix_groups_equals_the_explicit_mask(window: int | None, special: dict[str, Any]) -> None:
    inputs = states()
    found, _ = _attention(None, *inputs, None, fast=False, layout=Layout(LENGTHS), sliding_window=window, **special)
    expected = by_mask(*inputs, window, special.get("softcap"), special.get("s_aux"))
    assert_same_with_gradients(found, expected, inputs)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_one_call_for_all_sequences_equals_the_explicit_mask(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks gather, offsets, window and the gradient of shared keys; `varlen_attn` itself is replaced."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    monkeypatch.setattr(prefix_attention, "_varlen_arguments", lambda: {"enable_gqa": True})
    inputs = states()
    found = prefix_attention._varlen(*inputs, Layout(LENGTHS), None, window)
    expected = by_mask(*inputs, window, None, None)
    assert_same_with_gradients(found, expected, inputs)


def test_autocast_with_float32_queries_and_bfloat16_values() -> None:
    query, key, value = states()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = _attention(None, query, key, value.bfloat16(), None, fast=True, layout=Layout(LENGTHS))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), by_mask(query, key, value, None, None, None), atol=0.05, rtol=0.05)


HEAD = """
import torch
import rlhf_pl.models.gpu_head as gpu_head
from tests.models.test_kernels import check_head
check_head(gpu_head.gpu_logps)
cpu = torch.device("cpu")
assert all(gpu_head.has_gpu_kernels(cpu, dtype) for dtype in (torch.float32, torch.bfloat16))
plain = gpu_head.gpu_logps
gpu_head.gpu_logps = lambda *inputs: plain(*inputs) * 1.001
gpu_head._find_failure.cache_clear()
assert not gpu_head.has_gpu_kernels(cpu, torch.float32)
print("equal")
"""


def check_head(logps: Any, device: str = "cpu") -> None:
    """Compare log-probs and gradients of all kinds of heads to float64, with more tokens than a chunk.

    In bfloat16, the tolerance only allows rounding of operands and results; plain bfloat16 logits exceed it.
    """
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for bias, scale, cap, temperature in ((False, 1.0, None, 1.0), (True, 0.5, None, 0.7), (True, 2.0, 3.0, 1.3)):
            hidden = torch.randn(21, 16, device=device).to(dtype).requires_grad_()
            weight = torch.randn(5000, 16, device=device).to(dtype).requires_grad_()
            shift = torch.randn(5000, device=device).to(dtype).requires_grad_() if bias else None
            targets = torch.randint(5000, (21,), device=device)
            inputs = [t for t in (hidden, weight, shift) if t is not None]
            found = logps(hidden, targets, Head(weight, shift, scale, cap), temperature, 8)
            exact = [t.detach().double().requires_grad_() for t in inputs]
            logits = exact[0] @ exact[1].T + (exact[2] if bias else 0.0)
            logits = logits * scale
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            expected = (logits / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
            torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
            factors = torch.randn(21, device=device)
            ours = torch.autograd.grad((found * factors).sum(), inputs)
            theirs = torch.autograd.grad((expected * factors).sum(), exact)
            for gradient, reference in zip(ours, theirs, strict=True):
                assert gradient.dtype == dtype
                assert (gradient.double() - reference).norm() <= tolerance * reference.norm()


def test_the_blockwise_head_on_a_cpu_equals_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_pl.models.logprobs.VOCABULARY_BLOCK", 700)
    check_head(linear_logps)


@pytest.mark.skipif(find_spec("triton") is None, reason="no triton")
def test_the_heads_gpu_kernels_equal_float64() -> None:
    """Kernels with wrong results are not used."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", HEAD], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal" in done.stdout


def test_products_of_half_precision_are_not_rounded() -> None:
    """Plain bfloat16 logits have larger errors."""
    torch.manual_seed(0)
    a, b = torch.randn(40, 64).bfloat16(), torch.randn(64, 300).bfloat16()
    exact = a.double() @ b.double()
    error = (product(a, b).double() - exact).abs().max()
    assert error < 1e-4
    assert ((a @ b).double() - exact).abs().max() > 100 * error
    targets = torch.randint(300, (40,))
    ours = gather_logps(product(a, b), targets)
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("special", [{"softcap": 1.5}, {"s_aux": torch.linspace(-1, 2, 4)}])
def test_flex_attention_equals_the_explicit_mask(
    window: int | None, special: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks, soft-capping and sinks by FlexAttention on a CPU: not compiled, and only the forward pass."""
    from torch.nn.attention.flex_attention import flex_attention

    def plain(*inputs: Tensor, kernel_options: dict[str, Any], **options: Any) -> Any:
        return flex_attention(*inputs, **options)

    monkeypatch.setattr(prefix_attention, "_compiled_flex", lambda: plain)
    inputs = [t.detach() for t in states()]
    cap, sinks = special.get("softcap"), special.get("s_aux")
    found = prefix_attention._flex(*inputs, Layout(LENGTHS), None, window, cap, sinks)
    torch.testing.assert_close(found.double(), by_mask(*inputs, window, cap, sinks), atol=1e-5, rtol=1e-5)


def test_small_copies_have_the_same_weights() -> None:
    """gpt-oss initialises sinks and biases at random; in float32 only these could differ between the copies."""
    from transformers import GptOssConfig

    from rlhf_pl.models.compute import Compute
    from rlhf_pl.models.kernel_check import small_copies

    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    config = GptOssConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    before = torch.get_rng_state()
    copies = small_copies(config, Compute(), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    plain = copies.plain.state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in copies.exact.state_dict().items())
