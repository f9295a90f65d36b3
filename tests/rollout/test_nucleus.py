"""Top-p by buckets: the definition of a nucleus, and the results of transformers and vLLM."""

import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_pl.rollout.nucleus import keep_nucleus


def make_logits(rows: int, size: int, spread: float, seed: int = 0) -> Tensor:
    """Random logits, from nearly uniform (many tokens in the nucleus) to peaked (one token)."""
    return spread * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


@given(
    st.integers(1, 4), st.sampled_from([1, 5, 300, 5000]), st.floats(0.01, 20), st.floats(0.01, 1.0),
    st.integers(0, 1000),
)  # fmt: skip
def test_nucleus_is_the_smallest_set_with_the_probability(
    rows: int, size: int, spread: float, top_p: float, seed: int
) -> None:
    logits = make_logits(rows, size, spread, seed)
    result = keep_nucleus(logits.clone(), torch.tensor(top_p))
    kept = result > -torch.inf
    assert torch.equal(result[kept], logits[kept])
    probabilities = logits.double().softmax(-1)
    for row, inside in zip(probabilities, kept, strict=True):
        assert inside.any()
        assert row[inside].min() >= (row[~inside].max() if not inside.all() else 0)
        assert row[inside].sum() >= top_p - 1e-5, "it has the probability"
        assert row[inside].sum() - row[inside].min() < top_p + 1e-5, "without its last token it does not"


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_nucleus_matches_transformers(spread: float, top_p: float) -> None:
    """Except for one token at the edge, as sums over many tokens are rounded."""
    from transformers import TopPLogitsWarper

    logits = make_logits(8, 20_000, spread)
    expected = TopPLogitsWarper(top_p)(torch.zeros(8, 1), logits) > -torch.inf
    differ = (keep_nucleus(logits.clone(), torch.tensor(top_p)) > -torch.inf) ^ expected
    assert (differ.sum(-1) <= 1).all()
    assert (logits.softmax(-1) * differ).max() < 1e-4


def test_every_row_has_its_top_p_and_dropped_tokens_stay_dropped() -> None:
    logits = make_logits(3, 3000, 1.0)
    logits[:, ::3] = -torch.inf
    top_p = torch.tensor([0.2, 0.8, 1.0])
    kept = keep_nucleus(logits.clone(), top_p) > -torch.inf
    assert not kept[:, ::3].any()
    mass = (logits.softmax(-1) * kept).sum(-1)
    torch.testing.assert_close(mass, top_p, atol=2e-3, rtol=0)


def test_as_many_equally_likely_tokens_stay_as_needed() -> None:
    logits = torch.zeros(2, 100)
    logits[1, 40:] = -torch.inf
    assert (keep_nucleus(logits, torch.tensor(0.905)) == 0).sum(-1).tolist() == [91, 37]


def test_nan_logits_leave_no_token() -> None:
    """They come from missing weights, which the check after a weight sync reports; this must not fail before."""
    assert (keep_nucleus(torch.full((2, 50), torch.nan), torch.tensor(0.9)) == -torch.inf).all()


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM")
@pytest.mark.parametrize("spread", [0.5, 5.0])
def test_nucleus_matches_vllm(spread: float) -> None:
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    logits, top_p = make_logits(6, 8000, spread), torch.linspace(0.3, 0.95, 6)
    assert torch.equal(keep_nucleus(logits.clone(), top_p), apply_top_k_top_p_pytorch(logits.clone(), None, top_p))
