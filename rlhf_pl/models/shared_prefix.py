"""Models that read prefix groups: they compute a prompt once, and its responses do not attend to each other."""

from functools import cache, partial
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from rlhf_pl.models.compute import Compute
from rlhf_pl.models.kernel_check import FAILURES, Copies, NoCopyError, cached_check, is_as_exact, small_copies
from rlhf_pl.models.packed_layout import Layout
from rlhf_pl.models.shared_prefix_attention import FAST, PLAIN, register
from rlhf_pl.utils.console import note
from rlhf_pl.utils.errors import InputError


def takes_prefix_groups(lm: Any) -> bool:
    """Whether a model reads prefix groups."""
    return lm.config._attn_implementation in (FAST, PLAIN)


def hidden_states(lm: Any, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    """Hidden states of packed prefix groups, by the backbone of a model that reads them, shape (N, H)."""
    # a mask of four dimensions stops transformers from building an N x N mask; its values are not used
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    return lm.base_model(
        input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False, layout=layout
    ).last_hidden_state[0]


def share_prompts(lm: Any, compute: Compute | None = None, from_eager: bool = False) -> bool:
    """Make a model with sdpa attention read prefix groups, if a small copy then gives the same results as plain rows.

    Args:
        lm: A Hugging Face model; its weights are not used.
        compute: Device and dtypes of the computation; None for those of the model.
        from_eager: Also change a model with eager attention, because transformers has no sdpa for it.

    Returns:
        Whether the model reads prefix groups. If not, it is unchanged, and this is reported once.
    """
    before = lm.config._attn_implementation
    compute = compute or Compute(lm.device)
    register()
    try:
        if not cached_check(lm.config, compute, lm.dtype, "rows", partial(_has_independent_rows, lm, compute)):
            raise InputError(
                f"The results of {type(lm).__name__} for a row depend on the other rows of a batch, so they would be "
                "wrong. Choose another architecture, or open an issue."
            )
        for name in (FAST, PLAIN) if before == "sdpa" or from_eager else ():
            if cached_check(lm.config, compute, lm.dtype, name, partial(_is_attention_exact, lm, compute, name)):
                try:
                    lm.set_attn_implementation(name)
                except ValueError:  # the model does not support it
                    break
                return True
        if before != "eager" and not cached_check(
            lm.config, compute, lm.dtype, before, partial(_is_attention_exact, lm, compute, before)
        ):
            _note_eager(type(lm).__name__, before)
            before = "eager"
    except NoCopyError as error:
        _note_unchecked(type(lm).__name__, str(error))
    lm.set_attn_implementation(before)
    _note_not_shared(type(lm).__name__, before)
    return False


def use_exact_attention(lm: Any) -> None:
    """Use eager attention in a model that only reads rows, if sdpa omits something, for example soft-capping."""
    compute, before = Compute(lm.device), lm.config._attn_implementation
    try:
        if before != "eager" and not cached_check(
            lm.config, compute, lm.dtype, before, partial(_is_attention_exact, lm, compute, before)
        ):
            lm.set_attn_implementation("eager")
    except NoCopyError:
        return  # reported when the policy loads


def _copies(lm: Any, compute: Compute) -> Copies:
    return small_copies(lm.config, compute, lm.dtype, not type(lm).__module__.startswith("transformers."))


@torch.no_grad()
def _has_independent_rows(lm: Any, compute: Compute) -> bool:
    """Whether a row has the same results in a batch as alone."""
    copies = _copies(lm, compute)
    return torch.allclose(copies.hidden(copies.exact), copies.hidden_alone(), rtol=1e-2, atol=1e-3)


@torch.no_grad()
def _is_attention_exact(lm: Any, compute: Compute, attention: str) -> bool:
    """Whether an attention equals the model's eager attention on rows, with the run's device and dtype."""
    copies = _copies(lm, compute)
    exact, plain = copies.hidden(copies.exact), copies.hidden(copies.plain)
    try:
        copies.plain.set_attn_implementation(attention)
        found = (
            copies.hidden_packed(hidden_states) if takes_prefix_groups(copies.plain) else copies.hidden(copies.plain)
        )
    except FAILURES:
        return False
    return is_as_exact(found, plain, exact)


@cache
@rank_zero_only
def _note_not_shared(name: str, attention: str) -> None:
    note(
        f"the {attention} attention of {name} can't share a prompt between responses, so every response is computed "
        "with a copy of it."
    )


@cache
@rank_zero_only
def _note_eager(name: str, attention: str) -> None:
    note(f"the results of {attention} attention differ from those of eager attention in {name}; eager is used.")


@cache
@rank_zero_only
def _note_unchecked(name: str, why: str) -> None:
    note(f"attention is not checked: {name} has no small copy ({why}).")
