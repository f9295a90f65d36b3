"""Estimates of the memory that training on pairs takes, from a model's config, without loading weights."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rlhf_pl.models.classifier_head import empty_classifier
from rlhf_pl.models.compute import Compute
from rlhf_pl.models.logprobs import VOCABULARY_BLOCK
from rlhf_pl.models.lora import adapter_size, base_dtype, quantized_size
from rlhf_pl.models.policy import decoder_layers, meta_lm
from rlhf_pl.models.source import ModelSource

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# a weight in 4 bits, with a scale in 8 bits for 64 of them, and one in float32 for 256 scales
FOUR_BIT_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)

LOGIT_COPIES = 4  # float32 copies of a block of logits at the peak, including buffers of matrix products


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters.

    Args:
        total: All parameters; tied ones count once.
        trainable: Trainable parameters, including adapters.
        adapters: Parameters of adapters.
        layer: Parameters of one decoder layer.
        rest: Parameters outside the layers: embeddings, head, norms.
        layers: Number of decoder layers.
        quantized: Frozen parameters in 4 bits.
    """

    total: int
    trainable: int
    adapters: int
    layer: int
    rest: int
    layers: int
    quantized: int = 0

    def weight_bytes(self, width: int) -> int:
        """Bytes of all weights, where those not in 4 bits take `width` bytes each."""
        return width * (self.total - self.quantized) + int(FOUR_BIT_BYTES * self.quantized)

    def checkpoint_bytes(self, width: int) -> int:
        """Bytes of a checkpoint: weights, without a base in 4 bits, and AdamW's two moments of the trainable ones."""
        return width * ((self.trainable if self.quantized else self.total) + 2 * self.trainable)


def model_size(config: Any, trainable_layers: int | None = None, lora: Any = None) -> ModelSize:
    """Count the parameters of the model that `config` describes."""
    model = meta_lm(config)
    layers = decoder_layers(model)
    total, layer = _count_parameters(model), _count_parameters(layers[0])
    rest = total - layer * len(layers)
    adapters, quantized = 0, 0
    if lora is not None:
        adapters = adapter_size(model, lora)
    if base_dtype(lora) is not None:
        quantized = quantized_size(model)
    trainable = total
    if lora is not None:
        trainable = adapters
    elif trainable_layers is not None:
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        trainable = trainable_layers * layer + (0 if tied else _count_parameters(model.get_output_embeddings()))
    return ModelSize(total + adapters, trainable, adapters, layer, rest, len(layers), quantized)


def classifier_size(source: ModelSource, lora: Any = None) -> ModelSize:
    """Count the parameters of a classifier with one output, as a critic is; its head always trains."""
    model = empty_classifier(source)
    layers = decoder_layers(model)
    total, layer = _count_parameters(model), _count_parameters(layers[0])
    adapters = 0 if lora is None else adapter_size(model, lora)
    trainable = total if lora is None else adapters + total - _count_parameters(model.base_model)
    return ModelSize(total + adapters, trainable, adapters, layer, total - layer * len(layers), len(layers))


def head_size(config: Any) -> ModelSize:
    """Count the parameters of a value head on a policy: a weight for each hidden unit, and a bias."""
    total = config.get_text_config().hidden_size + 1
    return ModelSize(total, total, 0, 0, total, 0)


def reward_bytes(reward: Any) -> int:
    """Size of the weights of all reward models in this process, bytes."""
    total = 0
    for part in getattr(reward, "parts", [reward]):
        source = getattr(part, "source", None)
        if isinstance(source, ModelSource) and hasattr(part, "dtype"):
            dtype = part.dtype or str(source.config.dtype).removeprefix("torch.")
            total += DTYPE_BYTES.get(dtype, 4) * model_size(source.config).total
    return total


def trainer_bytes(module: nn.Module, device: torch.device) -> int:
    """Memory that a module holds on a device between training steps: weights, copies, AdamW's moments; bytes."""
    compute: Any = getattr(getattr(module, "policy", None), "compute", Compute())
    total = 0
    for parameter in module.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.device.type != device.type:  # offloaded
            continue
        size = local.numel() * local.element_size()
        total += size * (3 if parameter.requires_grad else 1)
        if compute.dtype is not None and not compute.sharded and local.dtype == torch.float32:
            total += local.numel() * compute.dtype.itemsize
    return total


def _count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class Kernels:
    """Kernels that determine which activations are saved.

    Args:
        half: Whether matrix products are in half precision.
        attention: Attention implementation of transformers.
        flash: Whether each layer calls flash attention once, which saves queries, keys, values and its output.
        liger: Whether liger-kernel computes norms and MLPs.
    """

    half: bool
    attention: str = "sdpa"
    flash: bool = False
    liger: bool = False


def activation_bytes(config: Any, rows: int, tokens: int, kernels: Kernels, checkpointing: bool) -> int:
    """Memory that the backbone saves for the backward pass, bytes.

    Runs a forward pass of one and of two layers on fake tensors and adds up what autograd saves; each further layer
    saves as much as the second one. With `checkpointing`, each layer saves only its input, and one layer at a time
    saves everything.
    """
    one, two = (_count_saved_bytes(config, layers, rows, tokens, kernels) for layers in (1, 2))
    layers = config.get_text_config().num_hidden_layers
    if checkpointing:
        hidden = rows * tokens * config.get_text_config().hidden_size * (2 if kernels.half else 4)
        return one + (layers - 1) * hidden
    return one + (layers - 1) * (two - one)


def _count_saved_bytes(config: Any, layers: int, rows: int, tokens: int, kernels: Kernels) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    config = deepcopy(config)
    config.get_text_config().num_hidden_layers = layers
    with FakeTensorMode(allow_non_fake_inputs=True):
        dtype = torch.bfloat16 if kernels.half else torch.float32
        attention = _register_flash_stand_in() if kernels.flash else kernels.attention
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        if kernels.liger:
            _save_as_liger_does(model)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        kept: dict[int, tuple[int, Any]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = (storage.nbytes(), tensor)  # keep the tensor, so that its address is not reused
            return tensor

        ids = torch.zeros(rows, tokens, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool) if kernels.flash else torch.ones_like(ids)
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return sum(size for size, _ in kept.values())


def _register_flash_stand_in() -> str:
    """Register an attention with transformers that saves the same tensors as flash attention."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    name = "rlhf_pl_footprint"

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[Any, None]:
        return _SaveInputs.apply(query, key, value).transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _save_as_liger_does(model: nn.Module) -> None:
    """Make norms save their input, and gated MLPs save the two factors of their product, as liger-kernel does."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda hidden: _SaveInputs.apply(hidden)
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
            module.forward = lambda hidden, mlp=module: mlp.down_proj(
                _SaveInputs.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden))
            )


class _SaveInputs(torch.autograd.Function):
    """Returns a tensor like its first input and saves all inputs."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return torch.empty_like(inputs[0])


def head_bytes(config: Any, chunk_tokens: int, on_gpu: bool, half: bool, trains: bool = True) -> int:
    """Peak memory of the output head's backward pass: logits, and the gradient of its weights; bytes.

    Args:
        config: The model's config.
        chunk_tokens: Tokens per chunk.
        on_gpu: Whether the GPU kernels run, which compute a chunk over the whole vocabulary.
        half: Whether matrix products are in half precision.
        trains: Whether the head's weights get a gradient.
    """
    text = config.get_text_config()
    weights = text.vocab_size * text.hidden_size
    if on_gpu:
        # a chunk's logits and their gradient; the gradient of the weights in float32 and its cast copy
        return chunk_tokens * text.vocab_size * (6 if half else 8) + trains * weights * (6 if half else 4)
    block = LOGIT_COPIES * 4 * chunk_tokens * min(text.vocab_size, VOCABULARY_BLOCK)
    return block + trains * weights * (2 if half else 4)


def kv_bytes(config: Any, sequences: int, tokens: int, dtype_bytes: int) -> int:
    """Size of a KV cache, bytes."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * size * dtype_bytes * sequences * tokens
