"""Attention over prompts and responses in a flat row: a response attends to its prompt and itself."""

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from rlhf_pl.models.packed_layout import Layout

FAST, PLAIN = "rlhf_pl_shared_prompt", "rlhf_pl_shared_prompt_plain"  # their names in transformers
_MAX_HEAD_SIZE = 256  # limit of flash attention


@cache
def register() -> None:
    """Register both attentions with transformers: the fastest kernels, and plain torch with one call per sequence."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    for name, attention in ((FAST, _fast), (PLAIN, _plain)):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, sdpa_mask)


def _fast(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    return _attention(module, query, key, value, mask, fast=True, **kwargs)


def _plain(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    return _attention(module, query, key, value, mask, fast=False, **kwargs)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    fast: bool,
    layout: Layout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention over rows or prefix groups, with the interface of transformers.

    Args:
        module: The model's attention layer.
        query: Shape (1, heads, N, D).
        key: Shape (1, KV heads, N, D).
        value: Shape (1, KV heads, N, D).
        attention_mask: Only for rows.
        fast: Whether kernels for whole batches may be used.
        layout: The lengths of prefix groups; None for rows.
        scaling: Factor on the products.
        sliding_window: Tokens that a token attends to, including itself; None for all.
        softcap: Bound of the soft-capped products (Gemma-2).
        s_aux: Logits of attention sinks, by head (gpt-oss).
        **kwargs: Only for rows.

    Returns:
        Shape (1, N, heads, D), and None.
    """
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if softcap is not None or s_aux is not None:  # sdpa ignores both
            key, value = _repeat_kv_heads(query, key, value)
            mask = attention_mask
            if mask is None:
                mask = _causal_mask(query.shape[2], key.shape[2], sliding_window, query.device)
            rows = _attend_by_hand(query, key, value, scaling, mask, softcap, s_aux)
            return rows.transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("position biases are not supported")
    # under autocast, rotary embeddings return float32 queries and keys, but values have half precision
    query, key = query.to(value.dtype), key.to(value.dtype)
    special = softcap is not None or s_aux is not None
    if fast and query.is_cuda and special and query.dtype != torch.float32:  # float32 takes minutes to compile
        return _flex(query, key, value, layout, scaling, sliding_window, softcap, s_aux), None
    if fast and query.is_cuda and not special and supports_varlen(query):
        return _varlen(query, key, value, layout, scaling, sliding_window), None
    key, value = _repeat_kv_heads(query, key, value)
    sizes = [size for prompt, first, *others in layout.lengths for size in (prompt + first, *others)]
    queries, keys, values = (t.split(sizes, dim=2) for t in (query, key, value))
    found: list[Tensor] = []

    def attend(index: int, keys: Tensor, values: Tensor) -> None:
        if special:
            mask = _causal_mask(queries[index].shape[2], keys.shape[2], sliding_window, query.device)
            found.append(_attend_by_hand(queries[index], keys, values, scaling, mask, softcap, s_aux))
        else:
            found.append(_attend(queries[index], keys, values, scaling, sliding_window))

    for prompt, _, *others in layout.lengths:
        first = len(found)
        attend(first, keys[first], values[first])
        if others:
            prompt_key, prompt_value = keys[first][:, :, :prompt], values[first][:, :, :prompt]
        for index in range(first + 1, first + 1 + len(others)):
            attend(index, torch.cat([prompt_key, keys[index]], dim=2), torch.cat([prompt_value, values[index]], dim=2))
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None


def supports_varlen(query: Tensor) -> bool:
    """Whether flash attention supports this dtype and head size."""
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= _MAX_HEAD_SIZE


@cache
def _varlen_arguments() -> dict[str, Any]:
    """Extra arguments of `varlen_attn`: torch versions after 2.11 need one for grouped KV heads."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None, window: int | None
) -> Tensor:
    """Attention by one call of flash attention for all sequences of a batch."""
    from torch.nn.attention.varlen import varlen_attn

    plan = layout.varlen
    left = -1 if window is None else window - 1  # flash attention does not count the token itself
    flat_query = query[0].transpose(0, 1).contiguous()
    flat_key, flat_value = (plan.gather(t[0].transpose(0, 1)) for t in (key, value))
    found: Any = varlen_attn(
        flat_query,
        flat_key,
        flat_value,
        plan.query_offsets,
        plan.key_offsets,
        plan.max_query,
        plan.max_key,
        scale=scaling,
        window_size=(left, 0),  # aligned at the last query and the last key
        **_varlen_arguments(),
    )
    return found[None]


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with soft-capping and sinks by a kernel compiled for them."""
    from torch.nn.attention.flex_attention import create_block_mask

    length = query.shape[2]

    def make_mask() -> Any:
        return create_block_mask(layout.mask_function(window), None, None, length, length, device=str(query.device))

    # a tensor: a number would be compiled into a separate kernel, or fail to compile
    cap = (
        None if softcap is None else layout.cached(("cap", softcap), lambda: torch.tensor(softcap, device=query.device))
    )

    def capped(score: Tensor, batch: Any, head: Any, index: Any, seen: Any) -> Tensor:
        assert cap is not None
        return cap * torch.tanh(score / cap)

    found = _compiled_flex()(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=layout.cached(("flex", window), make_mask),
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        return_lse=sinks is not None,
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},  # a few tokens are not a decoding step here
    )
    if sinks is not None:
        found, total = found
        found = found * torch.sigmoid(total - sinks.float()[None, :, None])[..., None].to(found.dtype)
    return found.transpose(1, 2).contiguous()


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Causal attention of a sequence's last tokens, (1, heads, Q, D), to all its tokens, (1, heads, K, D)."""
    length, seen = query.shape[2], key.shape[2]
    whole = window is None or window >= seen
    if whole and length == seen:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    mask: Any
    if whole and query.device.type == "cuda":
        mask = causal_lower_right(length, seen)  # uses kernels without a mask in memory
    else:
        mask = _causal_mask(length, seen, None if whole else window, query.device)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def _attend_by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    mask: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with soft-capping and sinks, which `scaled_dot_product_attention` does not support.

    Args:
        query: Shape (B, heads, Q, D).
        key: Shape (B, heads, K, D).
        value: Shape (B, heads, K, D).
        scaling: Factor on the products.
        mask: True where a query attends to a key, or values to add to the products; broadcast to (B, heads, Q, K).
        softcap: See `_attention`.
        sinks: Shape (heads,).
    """
    batch, seen = len(query), key.shape[2]
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float()
    lowest = torch.finfo(torch.float32).min  # not infinity: rows of padding attend to nothing
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[None, :, None, None].expand(batch, -1, query.shape[2], 1)], dim=-1)
    return scores.softmax(-1)[..., :seen].to(value.dtype) @ value


@lru_cache(maxsize=64)
def _causal_mask(length: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    """True where the last `length` of `seen` tokens attend, shape (length, seen)."""
    with torch.inference_mode(False):  # the mask is cached, and training may use it next
        rows = torch.arange(seen - length, seen, device=device)[:, None]
        columns = torch.arange(seen, device=device)
        mask = columns <= rows
        return mask if window is None else mask & (columns > rows - window)


def _repeat_kv_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat keys and values for all query heads that share them."""
    if key.shape[1] == query.shape[1]:
        return key, value
    groups = query.shape[1] // key.shape[1]
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
