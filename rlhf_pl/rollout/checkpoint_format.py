"""A policy's weights as checkpoints hold them, which is what vLLM loads."""

import re
from collections.abc import Callable

from torch import Tensor

from rlhf_pl.models.policy import meta_lm
from rlhf_pl.models.source import ModelSource
from rlhf_pl.rollout.base import NamedTensors


def checkpoint_format(source: ModelSource) -> Callable[[NamedTensors], NamedTensors]:
    """What turns the weights of a model in memory into those of its checkpoints, one decoder layer at a time.

    transformers renames and joins some on the way in, such as the weights of a layer's experts, which become one
    tensor.

    Args:
        source: Names the architecture.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    model = meta_lm(source.config, source.trust_remote_code)
    if not get_model_conversion_mapping(model, add_legacy=False):
        return lambda tensors: tensors

    def convert(tensors: NamedTensors) -> NamedTensors:
        layer, held = "", dict[str, Tensor]()
        for name, tensor in tensors:
            if held and _layer(name) != layer:
                yield from revert_weight_conversion(model, held).items()
                held = {}
            layer = _layer(name)
            held[name] = tensor
        yield from revert_weight_conversion(model, held).items()

    return convert


def _layer(name: str) -> str:
    """A tensor's name up to the number of its layer."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else ""
