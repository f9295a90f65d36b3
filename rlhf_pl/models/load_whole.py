"""Loads models completely or not at all: transformers initialises missing weights with random numbers."""

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

from rlhf_pl.models.config_files import CONFIG
from rlhf_pl.models.pretrained_files import WeightFiles
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.finite import find_first_nonfinite

IsNew = Callable[[Any, str], bool]
LOADING_INFO = {
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,
}  # transformers' own error would name no tensor
_MAX_NAMES = 8
_LAYER = re.compile(r"^(.*?\.)(\d+)(\..*)$")


def load_whole(source: ModelSource, loader: Any, is_new: IsNew = lambda model, name: False, **kwargs: Any) -> Any:
    """Load the model of `source` with every tensor from its checkpoint.

    Args:
        source: The model.
        loader: One of transformers' auto classes.
        is_new: (model, name) -> whether a tensor may be initialised, for example the head of a new reward model.
        kwargs: Arguments of `from_pretrained`.

    Raises:
        InputError: A file can't be read, tensors are missing or differ in shape from the config, or the checkpoint has
            layers that the config omits. Names the files and the tensors.
    """
    model, info = source.read("weights", loader, **LOADING_INFO, **kwargs)
    check_loading_info(source, model, info, is_new)
    return model


def check_whole(source: ModelSource, loader: Any, is_new: IsNew = lambda model, name: False, **kwargs: Any) -> None:
    """Check by names and shapes that `load_whole` will find every tensor. Reads no weights.

    For checkpoints with quantized weights, which transformers converts, only the quantization config is checked.

    Raises:
        InputError: As in `load_whole`.
    """
    _ = WeightFiles(source).shapes  # names the file if it is damaged
    quantization = getattr(source.config, "quantization_config", None)
    if quantization is not None:
        _check_quantization(source, quantization)
    else:
        # the checked config: transformers would read the file again
        load_whole(source, loader, is_new, **{"config": deepcopy(source.config), "device_map": {"": "meta"}, **kwargs})


def _check_quantization(source: ModelSource, settings: Any) -> None:
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        AutoQuantizationConfig.from_dict(deepcopy(settings))
    except Exception as error:  # transformers raises any error class for invalid values
        raise source.read_error("config", error) from error


def check_loading_info(
    source: ModelSource, model: Any, info: Mapping[str, Any], is_new: IsNew = lambda model, name: False
) -> None:
    """Raise InputError if transformers' loading info reports missing, mismatched or omitted tensors."""
    missing = sorted(name for name in info["missing_keys"] if not is_new(model, name))
    if missing:
        raise InputError(
            f"`{source.option}`: {source.path!r} lacks {_list_names(missing)}, which its {CONFIG} requires; they would "
            f"be random numbers. Get the complete {_list_files(source)}, or the {CONFIG} that belongs to these weights."
        )
    shapes = sorted((name, *map(tuple, both)) for name, *both in info["mismatched_keys"] if not is_new(model, name))
    if shapes:
        name, stored, required = shapes[0]
        raise InputError(
            f"`{source.option}`: {name} has the shape {stored} in {_list_files(source)} of {source.path!r}, and "
            f"{len(shapes) - 1} more tensors differ too; its {CONFIG} requires {required}. Use the {CONFIG} that "
            "belongs to these weights."
        )
    if more := _find_omitted_layers(model, info.get("unexpected_keys", ())):
        raise InputError(
            f"`{source.option}`: {_list_files(source)} of {source.path!r} has {_list_names(more)}, layers that its "
            f"{CONFIG} omits. Use the {CONFIG} that belongs to these weights."
        )


def _find_omitted_layers(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Tensors of complete layers like the model's own that follow its last layer.

    transformers ignores other tensors by design, for example those of multi-token prediction.
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


def _list_files(source: ModelSource) -> str:
    return ", ".join(WeightFiles(source).names[:_MAX_NAMES])


def _list_names(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more tensors" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def check_finite(model: Any, source: ModelSource) -> None:
    """Refuse a model whose loaded weights contain a NaN or an infinity.

    Raises:
        InputError: Names the first such tensor, and its file if the file uses the same name.
    """
    name = find_first_nonfinite(model.named_parameters())
    if name:
        file = WeightFiles(source).file_of(name)
        raise InputError(
            f"`{source.option}`: the weights of {source.path!r} are damaged: {name!r}"
            f"{f' in {file}' if file else ''} holds numbers that are not finite. A diverged training may have written "
            "them. Use another model, or an earlier checkpoint."
        )
