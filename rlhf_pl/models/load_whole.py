"""Models that are loaded whole or not at all: transformers fills what a checkpoint lacks with random numbers."""

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

from rlhf_pl.models.config_files import CONFIG
from rlhf_pl.models.pretrained_files import WeightFiles
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.finite import first_not_finite

New = Callable[[Any, str], bool]
TOLD = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # transformers' own error would name no tensor
_MOST_NAMES = 8
_LAYER = re.compile(r"^(.*?\.)(\d+)(\..*)$")


def load_whole(source: ModelSource, loader: Any, is_new: New = lambda model, name: False, **kwargs: Any) -> Any:
    """The model of `source` with every tensor from its checkpoint.

    Args:
        source: Where it is.
        loader: One of transformers' auto classes.
        is_new: (model, name) -> whether a tensor may be drawn anew, such as the head of a new reward model.
        kwargs: Of `from_pretrained`.

    Raises:
        InputError: A file can't be read, tensors are missing or have another shape than the config says, or there are
            layers that the config leaves out; names the files and the tensors.
    """
    model, info = source.read("weights", loader, **TOLD, **kwargs)
    refuse_gaps(source, model, info, is_new)
    return model


def check_whole(source: ModelSource, loader: Any, is_new: New = lambda model, name: False, **kwargs: Any) -> None:
    """Whether `load_whole` will find everything, told by names and shapes: no weights are read.

    Checkpoints with quantized weights, which transformers turns into others, are left to `load_whole`, but for what
    their config says of that.

    Raises:
        InputError: As `load_whole`.
    """
    _ = WeightFiles(source).shapes  # of a damaged file it says which one
    quantization = getattr(source.config, "quantization_config", None)
    if quantization is not None:
        _check_quantization(source, quantization)
    else:
        # the config as it was checked, not as transformers would read it once more
        load_whole(source, loader, is_new, **{"config": deepcopy(source.config), "device_map": {"": "meta"}, **kwargs})


def _check_quantization(source: ModelSource, settings: Any) -> None:
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        AutoQuantizationConfig.from_dict(deepcopy(settings))
    except Exception as error:  # its values get through transformers in errors of every kind
        raise source.unreadable("config", error) from error


def refuse_gaps(
    source: ModelSource, model: Any, info: Mapping[str, Any], is_new: New = lambda model, name: False
) -> None:
    """Raise InputError for what a loading report of transformers says of missing, wrong and left out tensors."""
    missing = sorted(name for name in info["missing_keys"] if not is_new(model, name))
    if missing:
        raise InputError(
            f"`{source.option}`: {source.path!r} lacks {_listed(missing)}, which its {CONFIG} asks for; they would be "
            f"random numbers. Get {_files(source)} whole, or take the {CONFIG} that belongs to these weights."
        )
    shapes = sorted((name, *map(tuple, both)) for name, *both in info["mismatched_keys"] if not is_new(model, name))
    if shapes:
        name, given, wanted = shapes[0]
        raise InputError(
            f"`{source.option}`: {name} has the shape {given} in {_files(source)} of {source.path!r}, and "
            f"{len(shapes) - 1} more tensors do not fit either; its {CONFIG} says {wanted}. Take the {CONFIG} that "
            "belongs to these weights."
        )
    if more := _layers_left_out(model, info.get("unexpected_keys", ())):
        raise InputError(
            f"`{source.option}`: {_files(source)} of {source.path!r} has {_listed(more)}, layers that its {CONFIG} "
            f"leaves out. Take the {CONFIG} that belongs to these weights."
        )


def _layers_left_out(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Tensors of whole layers like the model's own that follow after its last one.

    Others that transformers has no use for, such as those that predict several tokens, are left aside by design.
    """
    layers: dict[tuple[str, int], set[str]] = {}
    for name in unexpected:
        if found := _LAYER.match(name):
            layers.setdefault((found[1], int(found[2])), set()).add(found[3])
    own: dict[tuple[str, int], set[str]] = {}
    for name in model.state_dict():
        if found := _LAYER.match(name):
            own.setdefault((found[1], int(found[2])), set()).add(found[3])
    kinds = {(prefix, frozenset(parts)) for (prefix, _), parts in own.items()}
    return sorted(
        f"{prefix}{number}{part}"
        for (prefix, number), parts in layers.items()
        if (prefix, frozenset(parts)) in kinds and (prefix, number) not in own
        for part in parts
    )


def _files(source: ModelSource) -> str:
    return ", ".join(WeightFiles(source).names[:_MOST_NAMES])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more tensors" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def refuse_not_finite(model: Any, source: ModelSource) -> None:
    """Refuse a model whose weights, as they were read, hold a NaN or an infinity.

    Raises:
        InputError: Names the first such tensor, and its file where that has it under the same name.
    """
    name = first_not_finite(model.named_parameters())
    if name:
        file = WeightFiles(source).file_of(name)
        raise InputError(
            f"`{source.option}`: the weights of {source.path!r} are damaged: {name!r}"
            f"{f' in {file}' if file else ''} holds numbers that are not finite. A training that had diverged may have "
            "written them: take another model, or an earlier checkpoint's."
        )
