"""Rotary embeddings whose factors depend on the longest position of a call (`longrope`, `dynamic`), made steady.

transformers looks at the whole batch: a short row beside a long one gets the long one's factors. A policy gets those of
the longest row of its run at every call, as vLLM's engines do; a reward model gets those of each row's own length.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pl.models.packed_batch import common_tokens
from rlhf_pl.utils.errors import InputError

Thresholds = dict[str, int]  # of each kind of factors: positions beyond which they differ


def thresholds(config: Any) -> Thresholds:
    """Of a model's config, by rope type; empty where factors depend on no length."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    every = [parameters, *(p for p in parameters.values() if isinstance(p, Mapping))]
    found: Thresholds = {}
    for part in every:
        kind = part.get("rope_type") or part.get("type")
        if kind == "longrope":
            limit = part.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            found[kind] = int(limit or text.max_position_embeddings)
        elif kind is not None and "dynamic" in str(kind):
            found["dynamic"] = int(text.max_position_embeddings)
    return found


def factors_of(limits: Thresholds, length: int) -> int:
    """What tells the factors of one length from those of another: equal for lengths that have the same."""
    if length > limits.get("dynamic", length):
        return length
    return -1 if length > limits.get("longrope", length) else 0


def longrope_scales(config: Any, longest: int) -> tuple[float, float]:
    """By what `longrope` embeddings are multiplied in a run: by transformers, and by vLLM.

    vLLM reads neither `factor` nor `attention_factor`, but `short_mscale` and `long_mscale`, which transformers reads
    in PhiMoE alone.

    Args:
        config: Of a model with `longrope` embeddings.
        longest: Tokens of the longest row of the run.
    """
    text = config.get_text_config()
    parameters = text.rope_parameters
    part = next(p for p in (parameters, *parameters.values()) if isinstance(p, Mapping) and "long_factor" in p)
    limit = thresholds(config)["longrope"]
    stretch = text.max_position_embeddings / limit
    own, engine = part.get("attention_factor"), _longrope_scale(stretch, limit)
    own = _longrope_scale(part.get("factor") or stretch, limit) if own is None else own
    given = part.get("long_mscale" if longest > limit else "short_mscale")
    return given if given and text.model_type == "phimoe" else own, given or engine


def _longrope_scale(stretch: float, limit: int) -> float:
    return math.sqrt(1 + math.log(stretch) / math.log(limit)) if stretch > 1 else 1.0


def describe_factors(config: Any, longest: int) -> str | None:
    """The factors of a run whose longest row is `longest`, for its records; None where they depend on no length."""
    limits = thresholds(config)
    if not limits:
        return None
    which = factors_of(limits, longest)
    if which > 0:
        return f"dynamic, at {which} positions"
    kind, limit = next(iter(limits.items()))
    return f"{kind}, {'over' if which else 'up to'} {limit} positions"


def steady_rotary(model: nn.Module, config: Any, longest: int | None = None) -> None:
    """Have a model give a row the same numbers whatever stands beside it.

    Args:
        model: Changed in place: its rotary embeddings get a hook.
        config: The model's.
        longest: Every call gets the factors of this length; None for each row's own, where rows are told apart by
            position 0 and have no padding beyond their last position (`row_positions`).

    Raises:
        InputError: It has rotary embeddings of a kind that is not known here.
    """
    limits = thresholds(config)
    if not limits:
        return
    modules = [m for m in model.modules() if hasattr(m, "rope_type") and hasattr(m, "config")]
    if not modules:
        raise InputError(
            f"The rotary embeddings of {type(model).__name__} depend on the longest row of a batch in a way that is "
            "not known here, so a row's numbers would depend on what stands beside it. Choose another model, or one of "
            "transformers' own classes."
        )
    hook = partial(_by_row, limits) if longest is None else partial(_pinned, longest)
    for module in modules:
        module.register_forward_pre_hook(_forget_long)
        module.register_forward_hook(hook, with_kwargs=True)


def shared_tokens(rows: Sequence[list[int]], config: Any) -> int:
    """Of rows that get factors by their own length: how many first tokens are the same, embeddings included."""
    limits = thresholds(config)
    if len({factors_of(limits, len(row)) for row in rows}) > 1:
        return 0
    return common_tokens(rows)


def longest_row(trainer: Any, config: Any) -> int | None:
    """Tokens of the longest row of a Trainer's run, for `steady_rotary`; None where factors depend on no length.

    Raises:
        InputError: The DataModule does not say.
    """
    if trainer is None or not thresholds(config):
        return None
    data = getattr(trainer, "datamodule", None)
    longest = getattr(data, "longest_tokens", None)
    if longest is None:
        raise InputError(
            f"`data`: the rotary embeddings of {type(config).__name__} depend on the longest row of a run. Give "
            f"{type(data).__name__} an attribute `longest_tokens`: the tokens of its longest prompt with its response."
        )
    return int(longest)


def row_positions(attention_mask: Tensor) -> Tensor:
    """Positions of rows that are padded on the right, none of them beyond its row's last, shape (R, T)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _pinned(longest: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Embeddings as if a row of `longest` tokens stood beside each."""
    positions = _positions(args, kwargs)
    last = torch.full_like(positions[..., :1], longest - 1)
    found = _again(module, args, kwargs, torch.cat([positions, last], dim=-1))
    return _each(lambda part: part[..., :-1, :], found)


def _by_row(limits: Thresholds, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Embeddings of each row as if it stood alone."""
    positions = _positions(args, kwargs)
    lengths = _lengths(positions)
    groups: dict[int, list[int]] = {}
    for length in lengths.unique().tolist():
        groups.setdefault(factors_of(limits, length), []).append(length)
    found = None
    for same in groups.values():
        mine = torch.isin(lengths, torch.tensor(same, device=lengths.device))
        _forget(module)
        part = _again(module, args, kwargs, positions.masked_fill(~mine, 0))
        chosen = mine[..., None]
        found = part if found is None else _each(lambda new, old, m=chosen: torch.where(m, new, old), part, found)
    _forget(module)
    return found


def _lengths(positions: Tensor) -> Tensor:
    """Of each token the length of its row, where every row begins at position 0, shape as `positions`."""
    rows = (positions == 0).cumsum(-1)
    longest = torch.zeros(*positions.shape[:-1], positions.shape[-1] + 1, dtype=positions.dtype, device=rows.device)
    return longest.scatter_reduce(-1, rows, positions, "amax").gather(-1, rows) + 1


def _forget(module: Any) -> None:
    """`dynamic` embeddings keep the factors of the longest row they have seen; back to those of the start."""
    for name, start in list(module.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            prefix = name.removesuffix("original_inv_freq")
            setattr(module, f"{prefix}inv_freq", start)
            if hasattr(module, seen := f"{prefix}max_seq_len_cached"):
                setattr(module, seen, module.original_max_seq_len)


def _forget_long(module: nn.Module, args: Any = None) -> None:
    """transformers stumbles over the long factors that it has kept of a type of layers."""
    for name in [name for name in vars(module) if name.endswith("_long_inv_freq")]:
        delattr(module, name)


def _positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return kwargs["position_ids"] if "position_ids" in kwargs else args[1]


def _again(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], positions: Tensor) -> Any:
    """What the module gives at other positions, without its hooks."""
    _forget_long(module)
    if "position_ids" in kwargs:
        return module.forward(*args, **(kwargs | {"position_ids": positions}))
    return module.forward(args[0], positions, *args[2:], **kwargs)


def _each(change: Any, *outputs: Any) -> Any:
    """Of cosines and sines, or of one tensor."""
    if isinstance(outputs[0], Tensor):
        return change(*outputs)
    return tuple(change(*parts) for parts in zip(*outputs, strict=True))
