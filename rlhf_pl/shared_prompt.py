"""Attention for trees: a prompt once, and answers that see it and not each other."""

from functools import cache, lru_cache
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from rlhf_pl.console import console
from rlhf_pl.rows import Lengths, Tree, lay_out, padded

NAME = "rlhf_pl_shared_prompt"  # as transformers knows it


@cache
def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def is_shared(lm: Any) -> bool:
    """Whether a model takes trees."""
    return lm.config._attn_implementation == NAME


def hidden_states(lm: Any, input_ids: Tensor, position_ids: Tensor, lengths: Lengths) -> Tensor:
    """What the backbone of a model that takes trees makes of them, shape (N, H)."""
    # a mask of four dimensions keeps transformers from making one of N x N; it is not looked at
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    return lm.base_model(
        input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False, trees=lengths
    ).last_hidden_state[0]


@torch.no_grad()
def share_prompts(lm: Any) -> bool:
    """Have a model with sdpa attention take trees, if they give what its own attention gives for plain rows.

    Returns:
        Whether they do; if not, the model is as it was, and that is said once.
    """
    before = lm.config._attn_implementation
    if before != "sdpa":
        _say_plain(type(lm).__name__, before)
        return False
    _register()
    trees = [Tree([3, 17, 9, 5, 11], ([4, 8, 15], [16, 23, 42, 7])), Tree([6, 2, 13], ([12, 5],))]
    size = lm.config.get_text_config().vocab_size
    batch = lay_out([Tree(*_modulo(tree, size)) for tree in trees]).to(lm.device)
    ids, mask = padded(batch.input_ids, batch.lengths)
    expected = lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    expected = expected[batch.answer_of, batch.position_ids[0, batch.predictors]].float()
    try:
        lm.set_attn_implementation(NAME)
        found = hidden_states(lm, batch.input_ids, batch.position_ids, batch.lengths)[batch.predictors].float()
    except (TypeError, ValueError, RuntimeError, NotImplementedError, IndexError):  # not made for it
        found = torch.full_like(expected, torch.nan)
    tolerance = 1e-3 if lm.dtype == torch.float32 else 5e-2
    if (found - expected).norm() <= tolerance * expected.norm():
        return True
    lm.set_attn_implementation(before)
    _say_plain(type(lm).__name__, before)
    return False


@cache
@rank_zero_only
def _say_plain(name: str, attention: str) -> None:
    console.print(
        f"[yellow]note[/yellow]: the {attention} attention of {name} can't let answers share their prompt, so every "
        "answer is computed with a copy of it.",
        soft_wrap=True,
    )


def _modulo(tree: Tree, size: int) -> tuple[list[int], tuple[list[int], ...]]:
    return [i % size for i in tree.prompt], tuple([i % size for i in a] for a in tree.answers)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    trees: Lengths | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, as transformers calls it: of rows, or of trees.

    Every tree takes one causal call for its prompt and first answer, and one for each further answer with its prompt:
    no mask of the whole row, and no work on what a token does not see.

    Args:
        module: The model's attention layer.
        query: Shape (1, heads, N, D).
        key: Shape (1, KV heads, N, D).
        value: Shape (1, KV heads, N, D).
        attention_mask: Of rows.
        trees: Of each tree the tokens of its prompt and of every answer; None for rows.
        scaling: Factor on the products.
        sliding_window: Tokens that a token sees, itself included; None for all.
        **kwargs: For rows.

    Returns:
        Shape (1, N, heads, D), and None.
    """
    if trees is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("an attention of another kind")
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    sizes = [size for prompt, first, *others in trees for size in (prompt + first, *others)]
    queries, keys, values = (t.split(sizes, dim=2) for t in (query, key, value))
    found: list[Tensor] = []
    for prompt, _, *others in trees:
        first = len(found)
        found.append(_attend(queries[first], keys[first], values[first], scaling, sliding_window))
        if others:
            prompt_key, prompt_value = keys[first][:, :, :prompt], values[first][:, :, :prompt]
        for place in range(first + 1, first + 1 + len(others)):
            seen_keys = torch.cat([prompt_key, keys[place]], dim=2)
            seen_values = torch.cat([prompt_value, values[place]], dim=2)
            found.append(_attend(queries[place], seen_keys, seen_values, scaling, sliding_window))
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Causal attention of the last tokens of a sequence, (1, heads, Q, D), to all of it, (1, heads, K, D)."""
    length, seen = query.shape[2], key.shape[2]
    whole = window is None or window >= seen
    if whole and length == seen:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    mask: Any
    if whole and query.device.type == "cuda":
        mask = causal_lower_right(length, seen)  # kernels that need no mask in memory
    else:
        mask = _last_rows(length, seen, None if whole else window, query.device)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


@lru_cache(maxsize=64)
def _last_rows(length: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    """True where the last tokens see, shape (length, seen)."""
    rows = torch.arange(seen - length, seen, device=device)[:, None]
    columns = torch.arange(seen, device=device)
    mask = columns <= rows
    return mask if window is None else mask & (columns > rows - window)
