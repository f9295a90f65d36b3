"""Models that read trees: a prompt once, and answers that see it and not each other."""

from functools import cache, partial
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from rlhf_pl.models.compute import Compute
from rlhf_pl.models.kernel_check import FAILURES, Copies, NoCopyError, is_as_exact, once, small_copies
from rlhf_pl.models.packed_layout import Layout
from rlhf_pl.models.shared_prefix_attention import FAST, PLAIN, register
from rlhf_pl.utils.console import note
from rlhf_pl.utils.errors import InputError


def is_shared(lm: Any) -> bool:
    """Whether a model takes trees."""
    return lm.config._attn_implementation in (FAST, PLAIN)


def hidden_states(lm: Any, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    """What the backbone of a model that takes trees makes of them, shape (N, H)."""
    # a mask of four dimensions keeps transformers from making one of N x N; it is not looked at
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    return lm.base_model(
        input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False, layout=layout
    ).last_hidden_state[0]


def share_prompts(lm: Any, compute: Compute | None = None, from_eager: bool = False) -> bool:
    """Have a model with sdpa attention take trees, if a small copy of it then gives what plain rows give.

    Args:
        lm: A Hugging Face model; its weights are not looked at.
        compute: Where and how it will compute; None for where it is.
        from_eager: Also where it has eager attention, because transformers has no sdpa of it.

    Returns:
        Whether it takes them; if not, the model is as it was, and that is said once.
    """
    before = lm.config._attn_implementation
    compute = compute or Compute(lm.device)
    register()
    try:
        if not once(lm.config, compute, lm.dtype, "rows", partial(_has_own_rows, lm, compute)):
            raise InputError(
                f"What {type(lm).__name__} makes of a row depends on the other rows of a batch, so its numbers would "
                "be wrong. Choose another architecture, or open an issue."
            )
        for name in (FAST, PLAIN) if before == "sdpa" or from_eager else ():
            if once(lm.config, compute, lm.dtype, name, partial(_works, lm, compute, name)):
                try:
                    lm.set_attn_implementation(name)
                except ValueError:  # not made for it
                    break
                return True
        if before != "eager" and not once(lm.config, compute, lm.dtype, before, partial(_works, lm, compute, before)):
            _say_eager(type(lm).__name__, before)
            before = "eager"
    except NoCopyError as error:
        _say_unchecked(type(lm).__name__, str(error))
    lm.set_attn_implementation(before)
    _say_plain(type(lm).__name__, before)
    return False


def take_exact_attention(lm: Any) -> None:
    """Give a model that only reads rows its eager attention where sdpa leaves something out, such as soft-capping."""
    compute, before = Compute(lm.device), lm.config._attn_implementation
    try:
        if before != "eager" and not once(lm.config, compute, lm.dtype, before, partial(_works, lm, compute, before)):
            lm.set_attn_implementation("eager")
    except NoCopyError:
        return  # which is said where the policy loads


def _copies(lm: Any, compute: Compute) -> Copies:
    return small_copies(lm.config, compute, lm.dtype, not type(lm).__module__.startswith("transformers."))


@torch.no_grad()
def _has_own_rows(lm: Any, compute: Compute) -> bool:
    """Whether a row gives the same beside others as alone."""
    copies = _copies(lm, compute)
    return torch.allclose(copies.hidden(copies.exact), copies.alone(), rtol=1e-2, atol=1e-3)


@torch.no_grad()
def _works(lm: Any, compute: Compute, attention: str) -> bool:
    """Whether an attention gives what the model's eager one gives of rows, in its dtype where the run computes."""
    copies = _copies(lm, compute)
    exact, plain = copies.hidden(copies.exact), copies.hidden(copies.plain)
    try:
        copies.plain.set_attn_implementation(attention)
        found = copies.of_trees(hidden_states) if is_shared(copies.plain) else copies.hidden(copies.plain)
    except FAILURES:
        return False
    return is_as_exact(found, plain, exact)


@cache
@rank_zero_only
def _say_plain(name: str, attention: str) -> None:
    note(
        f"the {attention} attention of {name} can't let answers share their prompt, so every answer is computed with a "
        "copy of it."
    )


@cache
@rank_zero_only
def _say_eager(name: str, attention: str) -> None:
    note(f"{attention} attention does not give what eager attention gives of {name}; eager attention is used.")


@cache
@rank_zero_only
def _say_unchecked(name: str, why: str) -> None:
    note(f"no small copy of {name} could be made to try attention on ({why}).")
