"""The policy: how it is loaded, and the module that gives log-probs."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_pl.models.compute import Compute
from rlhf_pl.models.gpu_head import available, gpu_logps
from rlhf_pl.models.kernel_check import FAILURES, NoCopyError, once, small_copies
from rlhf_pl.models.liger import apply_liger
from rlhf_pl.models.load_whole import check_whole, load_whole, refuse_not_finite
from rlhf_pl.models.logprobs import Head, chunked_logps, linear_logps
from rlhf_pl.models.packed_batch import padded
from rlhf_pl.models.packed_layout import Layout
from rlhf_pl.models.quantization import keep_as_quantized, quantization_config
from rlhf_pl.models.rotary import steady_rotary
from rlhf_pl.models.shared_prefix import hidden_states, is_shared, share_prompts
from rlhf_pl.models.source import ModelSource
from rlhf_pl.models.working_copy import WorkingCopy
from rlhf_pl.utils.errors import InputError

Unit = TypeVar("Unit", bound=nn.Module)
RESCALING = "rescale_every"  # of RWKV's config: the number of layers between divisions by 2; 0 for none
DType = Literal["float32", "bfloat16", "float16"]


class PolicyLM(nn.Module):
    """A causal LM as one unit: token ids in, response log-probs out.

    Backbone and output head run inside one `forward`, so that a strategy that wraps the unit (DDP, FSDP) never sees
    a call to a part of it.

    Args:
        lm: A Hugging Face causal LM.
        logprob_chunk_tokens: Response tokens whose logits are held at a time.
        compute: Where and how it computes.
    """

    def __init__(self, lm: Any, logprob_chunk_tokens: int = 1024, compute: Compute = Compute()) -> None:  # noqa: B008
        super().__init__()
        self.lm = lm
        self.logprob_chunk_tokens = logprob_chunk_tokens
        self.compute = compute
        self.copy = working_copy(lm, compute)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        logit_positions: Tensor,
        targets: Tensor,
        response_ids: Tensor,
        layout: Layout,
        temperature: float = 1.0,
    ) -> Tensor:
        """Log-probs of the wanted tokens of a `PackedBatch`, each given what stands before it.

        A model that `share_prompts` has prepared reads every prompt once; others get padded rows.

        Args:
            input_ids: And the others: see `PackedBatch`.
            position_ids: Shape (1, N).
            logit_positions: Shape (M,).
            targets: Shape (M,).
            response_ids: Shape (M,).
            layout: Where prompts and answers lie.
            temperature: The sampling temperature that divides the logits.

        Returns:
            Shape (M,), float32, nats.
        """
        lm = self.lm if self.copy is None else self.copy.twin()
        with without_autocast(input_ids.device, self.compute):
            if is_shared(lm):
                hidden = hidden_states(lm, input_ids, position_ids, layout).index_select(0, logit_positions)
            else:
                ids, mask = padded(input_ids, layout.lengths)
                rows = lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                hidden = rows[response_ids, position_ids[0, logit_positions]]
        layer = lm.get_output_embeddings()
        if type(layer) is not nn.Linear or isinstance(layer.weight, DTensor) or layer._forward_pre_hooks:
            # a layer of another kind, or one whose weights come when it is called
            return chunked_logps(hidden, targets, lambda h: head_logits(lm, h), temperature, self.logprob_chunk_tokens)
        with torch.autocast(hidden.device.type, enabled=False):
            head = head_of(lm)
            hidden = hidden.to(head.weight.dtype)
            logps = gpu_logps if available(hidden.device, hidden.dtype) else linear_logps
            return logps(hidden, targets, head, temperature, self.logprob_chunk_tokens)

    def train(self, mode: bool = True) -> "PolicyLM":
        """See `train_in_eval_mode`."""
        return train_in_eval_mode(self, mode)

    def keep_copies_alone(self) -> None:
        """Of a policy that does not train: its weights in the dtype in which they multiply, and not twice."""
        if self.copy is not None:
            for parameter in self.lm.parameters():
                if parameter.dtype == torch.float32:
                    parameter.data = parameter.to(self.copy.dtype)
            self.copy = None

    @contextmanager
    def by_own_weights(self) -> Iterator[None]:
        """Compute with the weights as they are stored, without copies in half precision."""
        copy, self.copy = self.copy, None
        compute, self.compute = self.compute, Compute(self.compute.device)
        try:
            yield
        finally:
            self.copy, self.compute = copy, compute


def train_in_eval_mode(unit: Unit, mode: bool) -> Unit:
    """`unit.train(mode)`, but what is random or different in train mode stays as it is in eval mode (router noise).

    A policy must give the log-probs that its responses were sampled with. On are only what gradient checkpointing looks
    at, and the dropout in front of adapters, where that is asked for.
    """
    # Lightning asks whether that is meant
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
    for name, module in unit.named_modules():
        wanted = getattr(module, "gradient_checkpointing", False) or (".lora_dropout." in name)
        module.training = mode and (module is unit or bool(wanted))
    return unit


def working_copy(model: Any, compute: Compute) -> WorkingCopy | None:
    """Of a model whose weights multiply in another dtype than they are stored in, where no strategy sees to that."""
    if compute.dtype is None or compute.sharded or compute.dtype == model.dtype:
        return None
    return WorkingCopy(model, compute.dtype)


def without_autocast(device: torch.device, compute: Compute) -> Any:
    """Where the weights multiply in the wanted dtype as they are, autocast would only widen what lies between."""
    return nullcontext() if compute.dtype is None else torch.autocast(device.type, enabled=False)


def head_of(lm: Any) -> Head:
    """The output head with the scalings that some architectures add, as one thing."""
    layer, config = lm.get_output_embeddings(), lm.config.get_text_config()
    scale = 1.0
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        scale *= factor
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        scale /= divisor
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))  # Gemma-2


def head_logits(lm: Any, hidden: Tensor) -> Tensor:
    """The output head in the dtype of its weights, autocast aside: bf16 logits near 20 are off by up to 0.06 nats.

    Args:
        lm: A Hugging Face causal LM.
        hidden: Shape (N, H).

    Returns:
        Shape (N, V), float32.
    """
    layer = lm.get_output_embeddings()
    with torch.autocast(hidden.device.type, enabled=False):
        head = head_of(lm)
        logits = layer(hidden.to(layer.weight.dtype)).float()
        return Head(head.weight, None, head.scale, head.softcap).logits(logits)


def meta_lm(config: Any, trust_remote_code: bool = False, **arguments: Any) -> Any:
    """A causal LM without memory behind its weights; `arguments` are those of `from_config`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(deepcopy(config), trust_remote_code=trust_remote_code, **arguments)


def empty_lm(source: ModelSource) -> Any:
    """The architecture of `source` without memory behind its weights.

    Raises:
        InputError: transformers has no causal LM of it.
    """
    config = source.config
    try:
        return meta_lm(config, source.trust_remote_code)
    except Exception as error:  # numbers that fit no model come out of its layers as errors of every kind
        raise source.unbuildable("causal LM", error) from error


def check_lm(source: ModelSource) -> None:
    """Refuse a policy whose files are damaged, lack weights or contradict each other; reads no weights.

    Raises:
        InputError: Names the file and what is wrong.
    """
    from transformers import AutoModelForCausalLM

    empty_lm(source)
    check_whole(source, AutoModelForCausalLM)


def load_lm(
    source: ModelSource,
    dtype: DType = "float32",
    attn_implementation: str = "sdpa",
    base_dtype: str | None = None,
    compute: Compute = Compute(),  # noqa: B008 - frozen
    use_liger_kernel: bool | None = None,
    read_weights: bool = True,
    longest: int | None = None,
) -> Any:
    """The causal LM of `source`, with dropout off, in eval mode, checked to be one that `PolicyLM` can run.

    Args:
        source: Where it is.
        dtype: Dtype of the weights.
        attn_implementation: Attention of transformers.
        base_dtype: nf4 or fp4 for linear layers in 4 bits, on the current GPU where there is one.
        compute: Where and how it will compute, which fast paths are tried for.
        use_liger_kernel: Whether liger-kernel computes norms, MLPs and rotary embeddings; None for wherever it can.
        read_weights: Whether to read them; else the model is on the meta device. Those in 4 bits are always read.
        longest: Tokens of the longest row it will read, whose rotary factors all rows get; None for each row's own.

    Raises:
        InputError: The weights can't be read, or the architecture treats its logits in a way unknown here.
    """
    from transformers import AutoModelForCausalLM

    quantized: dict[str, Any] = {}
    if base_dtype is not None:
        quantized["quantization_config"] = quantization_config(base_dtype, getattr(torch, dtype))
        quantized["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    config = without_dropout(source.config)
    lacks_sdpa = attn_implementation == "sdpa" and not empty_lm(source)._supports_sdpa
    if lacks_sdpa:
        attn_implementation = "eager"  # what all such models have (gpt-oss, GPT-J, Bloom)
    arguments = {"dtype": getattr(torch, dtype), "attn_implementation": attn_implementation}
    if read_weights or quantized:
        lm = load_whole(source, AutoModelForCausalLM, config=config, **arguments, **quantized)
        refuse_not_finite(lm, source)
    else:
        lm = meta_lm(config, source.trust_remote_code, **arguments).eval()
    if base_dtype is not None:
        keep_as_quantized(lm)
    steady_rotary(lm, source.config, longest)
    _check_logits(lm, source, compute)
    available(compute.device, compute.weights_dtype(lm.dtype))  # tried, and said, before anything else
    share_prompts(lm, compute, from_eager=lacks_sdpa)
    apply_liger(lm, compute, use_liger_kernel, source.option)
    return lm


def train_last_layers(lm: Any, count: int, source: ModelSource) -> None:
    """Freeze the embeddings and all decoder layers but the last `count`.

    Raises:
        InputError: The model has fewer layers.
    """
    layers = decoder_layers(lm)
    if count > len(layers):
        raise InputError(f"`model.trainable_layers` is {count}, but {source.path!r} has {len(layers)} layers.")
    for module in (lm.get_input_embeddings(), *layers[: len(layers) - count]):
        module.requires_grad_(False)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a decoder, first to last: of all lists of modules the longest that is inside no other."""
    found: list[nn.ModuleList] = []
    todo: list[nn.Module] = [model]
    while todo:
        module = todo.pop()
        if isinstance(module, nn.ModuleList):  # what is inside, such as a layer's experts, is no list of layers
            found.append(module)
        else:
            todo.extend(module.children())
    return list(max(found, key=len, default=()))


def without_dropout(config: Any) -> Any:
    """A copy of a model's config with every dropout off, of layers too, and weights that stay as they are.

    RWKV divides its weights in eval mode, which would be trained and exported so.
    """
    config = deepcopy(config)
    for key, value in vars(config).items():
        if ("dropout" in key or "layerdrop" in key or key.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, key, 0.0)
    if hasattr(config, RESCALING):
        setattr(config, RESCALING, 0)
    return config


def _check_logits(lm: Any, source: ModelSource, compute: Compute) -> None:
    """Our logits must be the model's own: a head that is scaled in some new way would train on wrong log-probs."""
    try:
        same = once(lm.config, compute, lm.dtype, "logits", lambda: _has_known_logits(lm, source, compute))
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise source.unreadable("config", error) from error
    if not same:
        raise InputError(
            f"`{source.option}`: {source.path!r} ({type(lm).__name__}) changes its logits after the output head in a "
            "way that is not supported; log-probs would be wrong. Choose another architecture, or open an issue."
        )


@torch.no_grad()
def _has_known_logits(lm: Any, source: ModelSource, compute: Compute) -> bool:
    try:
        small = small_copies(lm.config, compute, lm.dtype, source.trust_remote_code).exact
    except NoCopyError as error:
        if lm.device.type == "meta":
            return True  # the rank that has the weights finds out
        if lm.base_model is lm:  # such as Llama-4's text model
            raise InputError(
                f"`{source.option}`: {type(lm).__name__} has no backbone that gives hidden states apart from its "
                "output head, which log-probs need. Choose another architecture, or open an issue."
            ) from error
        small = lm
    ids = torch.arange(8, device=small.device).unsqueeze(0) % small.config.get_text_config().vocab_size
    expected = small(input_ids=ids, use_cache=False).logits[0].float()
    if not expected.isfinite().all():
        raise source.unreadable("config", ValueError("its numbers make log-probs that are not finite"))
    hidden = small.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    actual = head_logits(small, hidden)
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-3, atol=1e-3)
