"""Makes rotary embeddings whose factors depend on the longest position of a call (`longrope`, `dynamic`) deterministic.

transformers uses the whole batch: a short row next to a long one gets the long one's factors. Here, a policy always
gets the factors of the longest row of its run, as in vLLM's engines; a reward model gets those of each row's length.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pl.models.packed_batch import common_prefix_length
from rlhf_pl.utils.errors import InputError

Thresholds = dict[str, int]  # rope type -> number of positions beyond which its factors change


def thresholds(config: Any) -> Thresholds:
    """The thresholds of a model's config, by rope type; empty if no factors depend on length."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    sections = [parameters, *(p for p in parameters.values() if isinstance(p, Mapping))]
    found: Thresholds = {}
    for part in sections:
        kind = part.get("rope_type") or part.get("type")
        if kind == "longrope":
            limit = part.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            found[kind] = int(limit or text.max_position_embeddings)
        elif kind is not None and "dynamic" in str(kind):
            found["dynamic"] = int(text.max_position_embeddings)
    return found


def factors_key(limits: Thresholds, length: int) -> int:
    """A key that is equal for two lengths if and only if they have the same factors."""
    if length > limits.get("dynamic", length):
        return length
    return -1 if length > limits.get("longrope", length) else 0


def longrope_scales(config: Any, longest: int) -> tuple[float, float]:
    """The scales of `longrope` embeddings in a run: that of transformers, and that of vLLM.

    vLLM reads `short_mscale` and `long_mscale`, not `factor` and `attention_factor`. transformers reads the former only
    in PhiMoE.

    Args:
        config: Config of a model with `longrope` embeddings.
        longest: Tokens of the run's longest row.
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
    """Describe the factors of a run whose longest row has `longest` tokens; None if they don't depend on length."""
    limits = thresholds(config)
    if not limits:
        return None
    which = factors_key(limits, longest)
    if which > 0:
        return f"dynamic, at {which} positions"
    kind, limit = next(iter(limits.items()))
    return f"{kind}, {'over' if which else 'up to'} {limit} positions"


def stabilize_rotary(model: nn.Module, config: Any, longest: int | None = None) -> None:
    """Make a model's results for a row independent of the other rows of a batch.

    Args:
        model: Changed in place: its rotary embeddings get hooks.
        config: The model's config.
        longest: Every call gets the factors of this length. None for the factors of each row's length; then every row
            must start at position 0 and padding must not exceed the row's last position (`row_positions`).

    Raises:
        InputError: The model has an unknown kind of rotary embeddings.
    """
    limits = thresholds(config)
    if not limits:
        return
    modules = [m for m in model.modules() if hasattr(m, "rope_type") and hasattr(m, "config")]
    if not modules:
        raise InputError(
            f"The rotary embeddings of {type(model).__name__} depend on the longest row of a batch in an unknown way, "
            "so a row's results would depend on the other rows. Choose another model, or one of transformers' own "
            "classes."
        )
    hook = partial(_factors_by_row, limits) if longest is None else partial(_factors_of_longest, longest)
    for module in modules:
        module.register_forward_pre_hook(_drop_long_factors)
        module.register_forward_hook(hook, with_kwargs=True)


def shared_prefix_length(rows: Sequence[list[int]], config: Any) -> int:
    """Length of the common prefix of rows that get factors by their own length; 0 if their factors differ."""
    limits = thresholds(config)
    if len({factors_key(limits, len(row)) for row in rows}) > 1:
        return 0
    return common_prefix_length(rows)


def longest_row(trainer: Any, config: Any) -> int | None:
    """Tokens of the longest row of a Trainer's run, for `stabilize_rotary`; None if factors don't depend on length.

    Raises:
        InputError: The DataModule does not define it.
    """
    if trainer is None or not thresholds(config):
        return None
    data = getattr(trainer, "datamodule", None)
    longest = getattr(data, "longest_tokens", None)
    if longest is None:
        raise InputError(
            f"`data`: the rotary embeddings of {type(config).__name__} depend on the longest row of a run. Add an "
            f"attribute `longest_tokens` to {type(data).__name__}: the tokens of its longest prompt with its response."
        )
    return int(longest)


def row_positions(attention_mask: Tensor) -> Tensor:
    """Positions of right-padded rows; padding has the position of its row's last token; shape (R, T)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _factors_of_longest(longest: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Embeddings with the factors of a row of `longest` tokens."""
    positions = _get_positions(args, kwargs)
    last = torch.full_like(positions[..., :1], longest - 1)
    found = _recompute(module, args, kwargs, torch.cat([positions, last], dim=-1))
    return _map_outputs(lambda part: part[..., :-1, :], found)


def _factors_by_row(limits: Thresholds, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Embeddings of each row with the factors of its own length."""
    positions = _get_positions(args, kwargs)
    lengths = _row_lengths(positions)
    groups: dict[int, list[int]] = {}
    for length in lengths.unique().tolist():
        groups.setdefault(factors_key(limits, length), []).append(length)
    found = None
    for same in groups.values():
        mine = torch.isin(lengths, torch.tensor(same, device=lengths.device))
        _reset_dynamic_factors(module)
        part = _recompute(module, args, kwargs, positions.masked_fill(~mine, 0))
        chosen = mine[..., None]
        found = (
            part if found is None else _map_outputs(lambda new, old, m=chosen: torch.where(m, new, old), part, found)
        )
    _reset_dynamic_factors(module)
    return found


def _row_lengths(positions: Tensor) -> Tensor:
    """The length of each token's row, with the shape of `positions`; every row starts at position 0."""
    rows = (positions == 0).cumsum(-1)
    longest = torch.zeros(*positions.shape[:-1], positions.shape[-1] + 1, dtype=positions.dtype, device=rows.device)
    return longest.scatter_reduce(-1, rows, positions, "amax").gather(-1, rows) + 1


def _reset_dynamic_factors(module: Any) -> None:
    """Reset `dynamic` embeddings, which keep the factors of the longest row so far, to their initial factors."""
    for name, start in list(module.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            prefix = name.removesuffix("original_inv_freq")
            setattr(module, f"{prefix}inv_freq", start)
            if hasattr(module, cached_length := f"{prefix}max_seq_len_cached"):
                setattr(module, cached_length, module.original_max_seq_len)


def _drop_long_factors(module: nn.Module, args: Any = None) -> None:
    """Delete cached long factors of a type of layers: transformers fails if they exist."""
    for name in [name for name in vars(module) if name.endswith("_long_inv_freq")]:
        delattr(module, name)


def _get_positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return kwargs["position_ids"] if "position_ids" in kwargs else args[1]


def _recompute(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], positions: Tensor) -> Any:
    """The module's output at other positions, without its hooks."""
    _drop_long_factors(module)
    if "position_ids" in kwargs:
        return module.forward(*args, **(kwargs | {"position_ids": positions}))
    return module.forward(args[0], positions, *args[2:], **kwargs)


def _map_outputs(change: Any, *outputs: Any) -> Any:
    """Apply a function to cosines and sines, or to one tensor."""
    if isinstance(outputs[0], Tensor):
        return change(*outputs)
    return tuple(change(*parts) for parts in zip(*outputs, strict=True))
