"""Converts a policy's weights to the format of its checkpoints, which vLLM loads."""

import re
from collections.abc import Callable

from torch import Tensor

from rlhf_pl.models.policy import meta_lm
from rlhf_pl.models.source import ModelSource
from rlhf_pl.rollout.base import NamedTensors


def make_checkpoint_converter(source: ModelSource) -> Callable[[NamedTensors], NamedTensors]:
    """Make a function that converts a model's weights to those of its checkpoints, one decoder layer at a time.

    transformers renames and merges some weights when it loads a checkpoint: those of a layer's experts become one
    tensor.

    Args:
        source: The model's source, for its architecture.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    model = meta_lm(source.config, source.trust_remote_code)
    if not get_model_conversion_mapping(model, add_legacy=False):
        return lambda tensors: tensors

    def convert(tensors: NamedTensors) -> NamedTensors:
        layer, pending = "", dict[str, Tensor]()
        for name, tensor in tensors:
            if pending and _layer_prefix(name) != layer:
                yield from revert_weight_conversion(model, pending).items()
                pending = {}
            layer = _layer_prefix(name)
            pending[name] = tensor
        yield from revert_weight_conversion(model, pending).items()

    return convert


def _layer_prefix(name: str) -> str:
    """A tensor's name up to and including its layer number."""
    match = re.match(r".*?\.\d+\.", name)
    return match[0] if match else ""
