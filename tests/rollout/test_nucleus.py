import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_pl.rollout.nucleus import nucleus


def logits_of(rows: int, size: int, spread: float, seed: int = 0) -> Tensor:
    """From nearly uniform (many tokens in the nucleus) to peaked (one)."""
    return spread * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


@given(
    st.integers(1, 4), st.sampled_from([1, 5, 300, 5000]), st.floats(0.01, 20), st.floats(0.01, 1.0),
    st.integers(0, 1000),
)  # fmt: skip
def test_it_is_the_fewest_of_the_likeliest_that_hold_the_share(
    rows: int, size: int, spread: float, top_p: float, seed: int
) -> None:
    logits = logits_of(rows, size, spread, seed)
    found = nucleus(logits.clone(), torch.tensor(top_p))
    kept = found > -torch.inf
    assert torch.equal(found[kept], logits[kept])
    probabilities = logits.double().softmax(-1)
    for row, inside in zip(probabilities, kept, strict=True):
        assert inside.any()
        assert row[inside].min() >= (row[~inside].max() if not inside.all() else 0)
        assert row[inside].sum() >= top_p - 1e-5, "it holds the share"
        assert row[inside].sum() - row[inside].min() < top_p + 1e-5, "and without its last token does not"


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_it_is_that_of_transformers(spread: float, top_p: float) -> None:
    """But for a token at the edge, where tokens are many and sums of as many are rounded."""
    from transformers import TopPLogitsWarper

    logits = logits_of(8, 20_000, spread)
    expected = TopPLogitsWarper(top_p)(torch.zeros(8, 1), logits) > -torch.inf
    differ = (nucleus(logits.clone(), torch.tensor(top_p)) > -torch.inf) ^ expected
    assert (differ.sum(-1) <= 1).all()
    assert (logits.softmax(-1) * differ).max() < 1e-4


def test_every_row_has_its_share_and_what_was_dropped_before_stays_out() -> None:
    logits = logits_of(3, 3000, 1.0)
    logits[:, ::3] = -torch.inf
    shares = torch.tensor([0.2, 0.8, 1.0])
    kept = nucleus(logits.clone(), shares) > -torch.inf
    assert not kept[:, ::3].any()
    held = (logits.softmax(-1) * kept).sum(-1)
    torch.testing.assert_close(held, shares, atol=2e-3, rtol=0)


def test_of_equally_likely_tokens_as_many_as_it_takes_stay() -> None:
    logits = torch.zeros(2, 100)
    logits[1, 40:] = -torch.inf
    assert (nucleus(logits, torch.tensor(0.905)) == 0).sum(-1).tolist() == [91, 37]


def test_weights_that_never_came_leave_no_token() -> None:
    """The check after a hand-over has something to say of that; here it must not fail."""
    assert (nucleus(torch.full((2, 50), torch.nan), torch.tensor(0.9)) == -torch.inf).all()


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM")
@pytest.mark.parametrize("spread", [0.5, 5.0])
def test_it_is_that_of_vllm(spread: float) -> None:
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    logits, shares = logits_of(6, 8000, spread), torch.linspace(0.3, 0.95, 6)
    assert torch.equal(nucleus(logits.clone(), shares), apply_top_k_top_p_pytorch(logits.clone(), None, shares))
