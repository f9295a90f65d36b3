"""How much memory training on pairs takes, told from a model's config: no weights are loaded."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlhf_pl.logprobs import VOCABULARY_BLOCK
from rlhf_pl.policy import decoder_layers

LOGIT_COPIES = 4  # float32 copies of a block of logits at the peak, with what matrix products pack


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters.

    Args:
        total: All of them, tied ones once.
        trainable: Those that train.
        adapters: Of these, in adapters.
        layer: Of one decoder layer.
        rest: Outside of the layers: embeddings, head, norms.
        layers: Number of decoder layers.
    """

    total: int
    trainable: int
    adapters: int
    layer: int
    rest: int
    layers: int


def meta_model(config: Any) -> Any:
    """A causal LM without memory behind its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(deepcopy(config))


def model_size(config: Any, trainable_layers: int | None = None, lora: Any = None) -> ModelSize:
    """Of the model that `config` describes."""
    model = meta_model(config)
    layers = decoder_layers(model)
    total, layer = _count(model), _count(layers[0])
    rest = total - layer * len(layers)
    adapters = 0
    if lora is not None:
        wanted = lora.target_modules
        for name, module in model.base_model.named_modules():
            if isinstance(module, nn.Linear) and (wanted is None or name.split(".")[-1] in wanted):
                adapters += lora.rank * (module.in_features + module.out_features)
    trainable = total
    if lora is not None:
        trainable = adapters
    elif trainable_layers is not None:
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        trainable = trainable_layers * layer + (0 if tied else _count(model.get_output_embeddings()))
    return ModelSize(total + adapters, trainable, adapters, layer, rest, len(layers))


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def activation_bytes(config: Any, rows: int, tokens: int, bf16: bool, checkpointing: bool, attention: str) -> int:
    """What the backbone keeps for the backward pass, bytes.

    The model of one and of two layers goes through a forward pass on tensors without memory, and what autograd saves is
    added up; a further layer keeps what the second one does. With `checkpointing` a layer keeps its input, and one
    layer at a time everything.
    """
    one, two = (_saved(config, layers, rows, tokens, bf16, attention) for layers in (1, 2))
    layers = config.get_text_config().num_hidden_layers
    if checkpointing:
        hidden = rows * tokens * config.get_text_config().hidden_size * (2 if bf16 else 4)
        return one + (layers - 1) * hidden
    return one + (layers - 1) * (two - one)


def _saved(config: Any, layers: int, rows: int, tokens: int, bf16: bool, attention: str) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    config = deepcopy(config)
    config.get_text_config().num_hidden_layers = layers
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        kept: dict[int, tuple[int, Any]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = (storage.nbytes(), tensor)  # the tensor too: its address must stay its own
            return tensor

        ids = torch.zeros(rows, tokens, dtype=torch.long)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return sum(size for size, _ in kept.values())


def logits_bytes(config: Any, chunk_tokens: int, gradient_bytes: int = 4) -> int:
    """What the output head takes at the peak of its backward pass: a block of logits, and the gradient of its weights.

    Args:
        config: The model's.
        chunk_tokens: Tokens of a block.
        gradient_bytes: Of a number of that gradient; 0 for a head that does not train.
    """
    text = config.get_text_config()
    block = LOGIT_COPIES * 4 * chunk_tokens * min(text.vocab_size, VOCABULARY_BLOCK)
    return block + gradient_bytes * text.vocab_size * text.hidden_size


def kv_bytes(config: Any, sequences: int, tokens: int, dtype_bytes: int) -> int:
    """A cache of keys and values."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * size * dtype_bytes * sequences * tokens
