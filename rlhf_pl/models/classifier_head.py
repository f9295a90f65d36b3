"""The heads of reward models' checkpoints: how to find them under other names, and what they must be."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_pl.models.load_whole import IsNew, check_loading_info, check_whole
from rlhf_pl.models.pretrained_files import WeightFiles
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError

# names of the head in checkpoints of transformers, TRL, DeepSpeed-Chat and Starling, OpenRLHF, CleanRL
HEADS = (
    "score",
    "classifier",
    "v_head.summary",
    "v_head",
    "value_head.summary",
    "value_head",
    "reward_head",
    "rm_head",
    "regression_head",
    "scalar_head",
)


@dataclass(frozen=True)
class HeadPlan:
    """How to load a checkpoint into transformers' classifier.

    Args:
        rename: Maps the checkpoint's tensor names to the classifier's; None if they are the same.
    """

    rename: dict[str, str] | None = None


def find_head(source: ModelSource, files: WeightFiles) -> HeadPlan:
    """Find out how to load the checkpoint into transformers' classifier with one output.

    Args:
        source: Defines the architecture.
        files: The checkpoint's weight files.

    Raises:
        InputError: The head is missing (the tensors are listed), has several layers, or has several outputs.
    """
    empty = empty_classifier(source)
    prefix, own, given = empty.base_model_prefix + ".", empty.state_dict(), files.shapes
    head = [name for name in own if not name.startswith(prefix)]
    output = [name for name in head if name.endswith("weight")][-1]
    extra = output.removesuffix("weight") + "bias"  # transformers' own linear head has none
    if all(name in given for name in head) and (extra in own or extra not in given):
        _check_outputs(files, given[output])
        return HeadPlan()
    backbone = [name.removeprefix(prefix) for name in own if name.startswith(prefix)]
    given_prefix = _find_backbone_prefix(backbone, given)
    weight = next((n for h in HEADS for n in given if f".{n}".endswith(f".{h}.weight")), None)
    if len(head) == 1 and given_prefix is not None and weight is not None:
        width = own[output].shape[1]
        if given[weight] == (width,) or (len(given[weight]) == 2 and given[weight][1] == width):
            _check_outputs(files, given[weight] if len(given[weight]) == 2 else (1,))
            bias = weight.removesuffix("weight") + "bias"
            rename = {given_prefix + name: prefix + name for name in backbone} | {weight: output}
            return HeadPlan(rename | ({bias: output.removesuffix("weight") + "bias"} if bias in given else {}))
    missing = [name for name in head if name not in given]
    words = {h.split(".")[0] for h in HEADS}
    similar = [name for name in given if words & set(name.split(".")) and name not in own]
    raise InputError(
        f"`{files.source.option}`: {files.source.path!r} lacks the head of a reward model: {', '.join(missing)}. "
        + (
            f"It has {', '.join(similar[:6])}, which is not one linear layer on top of this architecture."
            if similar
            else "It is not a reward model, and a random head would give random scores."
        )
    )


def _find_backbone_prefix(backbone: list[str], given: dict[str, tuple[int, ...]]) -> str | None:
    """The prefix of the backbone's names in a checkpoint; None if the backbone is not complete there."""
    longest = max(backbone, key=len)
    prefixes = sorted({name.removesuffix(longest) for name in given if name.endswith(longest)}, key=len)
    return next((p for p in prefixes if all(p + name in given for name in backbone)), None)


def _check_outputs(files: WeightFiles, shape: tuple[int, ...]) -> None:
    if shape[0] != 1:
        raise InputError(
            f"`{files.source.option}`: {files.source.path!r} has {shape[0]} labels; a reward model has 1. A classifier "
            "with several classes does not give a single reward; ArmoRM is loaded by `ArmoRMReward`."
        )


def empty_classifier(source: ModelSource) -> Any:
    """transformers' classifier of this architecture with one output, on the meta device."""
    from transformers import AutoModelForSequenceClassification

    config = deepcopy(source.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # an invalid config can raise any error class in the model's layers
        raise source.build_error("sequence classifier", error) from error


def has_head(source: ModelSource) -> bool:
    """Whether a checkpoint contains the head of a reward model."""
    try:
        find_head(source, WeightFiles(source))
    except InputError:
        return False
    return True


def is_head_tensor(model: Any, name: str) -> bool:
    """Whether a tensor belongs to a classifier's head or pooler, which a new classifier initialises."""
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def check_classifier(source: ModelSource, weights: ModelSource | None = None) -> None:
    """Refuse a reward model whose files are damaged, incomplete or inconsistent. Reads no weights.

    Args:
        source: Config and tokenizer.
        weights: Location of the weights, if not `source`.

    Raises:
        InputError: Names the file and what is wrong.
    """
    weights = weights or source
    files = WeightFiles(weights)
    rename = find_head(source, files).rename
    if rename is None and weights is source:
        _check_own_head(source)
        return
    model = empty_classifier(source)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {ours: files.shapes[theirs] for theirs, ours in (rename or dict(zip(own, own, strict=True))).items()
             if theirs in files.shapes}  # fmt: skip
    wrong = [
        (name, given[name], shape)
        for name, shape in own.items()
        if name in given and given[name] != shape and not is_head_tensor(model, name)  # a head may be a vector
    ]
    check_loading_info(weights, model, {"missing_keys": own.keys() - given.keys(), "mismatched_keys": wrong})


def check_new_classifier(source: ModelSource) -> None:
    """Like `check_classifier`, for the start of a reward model's training: the head may be missing."""
    empty_classifier(source)
    if has_head(source):
        check_classifier(source)
    else:
        _check_own_head(source, is_head_tensor)


def _check_own_head(source: ModelSource, is_new: IsNew = lambda model, name: False) -> None:
    from transformers import AutoModelForSequenceClassification

    config = deepcopy(source.config)
    config.num_labels = 1
    check_whole(source, AutoModelForSequenceClassification, is_new, config=config)
