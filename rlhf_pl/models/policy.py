"""The policy: loading, and the module that computes log-probs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_pl.models.compute import Compute
from rlhf_pl.models.gpu_head import gpu_logps, has_gpu_kernels
from rlhf_pl.models.kernel_check import FAILURES, NoCopyError, cached_check, small_copies
from rlhf_pl.models.liger import apply_liger
from rlhf_pl.models.load_whole import check_finite, check_whole, load_whole
from rlhf_pl.models.logprobs import Head, chunked_logps, linear_logps
from rlhf_pl.models.packed_layout import Layout
from rlhf_pl.models.quantization import disable_repacking, quantization_config
from rlhf_pl.models.rotary import stabilize_rotary
from rlhf_pl.models.rounding import round_to
from rlhf_pl.models.shared_prefix import share_prompts
from rlhf_pl.models.source import ModelSource
from rlhf_pl.models.target_states import target_states
from rlhf_pl.models.value_head import apply_value_head
from rlhf_pl.models.working_copy import WorkingCopy, working_copies
from rlhf_pl.utils.errors import InputError

Unit = TypeVar("Unit", bound=nn.Module)
RESCALING = "rescale_every"  # key of RWKV's config: number of layers between divisions of weights by 2; 0 for none
DType = Literal["float32", "bfloat16", "float16"]
Outputs = Literal["logps", "values", "both"]


class PolicyLM(nn.Module):
    """A causal LM as one module that maps token ids to log-probs of responses.

    Backbone and output head run inside one `forward`, so that a strategy that wraps the module (DDP, FSDP) never sees
    a call to a part of it.

    Args:
        lm: A Hugging Face causal LM.
        logprob_chunk_tokens: Response tokens whose logits are in memory at a time.
        compute: Device and dtypes of the computation.

    Attributes:
        value_head: A head on the last hidden states that gives the values of a critic; None without one.
    """

    def __init__(self, lm: Any, logprob_chunk_tokens: int = 1024, compute: Compute = Compute()) -> None:  # noqa: B008
        super().__init__()
        self.lm = lm
        self.logprob_chunk_tokens = logprob_chunk_tokens
        self.compute = compute
        self.copy = working_copy(lm, compute)
        self.value_head: nn.Linear | None = None

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        logit_positions: Tensor,
        targets: Tensor,
        response_ids: Tensor,
        layout: Layout,
        temperature: float = 1.0,
        outputs: Outputs = "logps",
    ) -> Any:
        """Log-probs of the target tokens of a `PackedBatch`, each given the tokens before it.

        A model prepared by `share_prompts` computes each prompt once; others get padded rows.

        Args:
            input_ids: See `PackedBatch` for this and the other tensors; shape (1, N).
            position_ids: Shape (1, N).
            logit_positions: Shape (M,).
            targets: Shape (M,).
            response_ids: Shape (M,).
            layout: Lengths of the prompts and responses.
            temperature: The sampling temperature that divides the logits.
            outputs: What to compute. With a `value_head`, also the `values` of the states before the targets.

        Returns:
            Log-probs, shape (M,), float32, nats; or values, shape (M,), float32; or a tuple of both.
        """
        lm = self.lm if self.copy is None else self.copy.prepare_module()
        with without_autocast(input_ids.device, self.compute):
            hidden = target_states(lm, input_ids, position_ids, logit_positions, response_ids, layout)
        if outputs == "logps":
            return self._logps(lm, hidden, targets, temperature)
        assert self.value_head is not None
        values = apply_value_head(self.value_head, hidden)
        return values if outputs == "values" else (self._logps(lm, hidden, targets, temperature), values)

    def _logps(self, lm: Any, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Log-probs of targets from the hidden states that predict them, shape (M, H) to (M,)."""
        layer = lm.get_output_embeddings()
        if type(layer) is not nn.Linear or isinstance(layer.weight, DTensor) or layer._forward_pre_hooks:
            # another kind of layer, or one whose weights are only loaded when it is called
            return chunked_logps(hidden, targets, lambda h: head_logits(lm, h), temperature, self.logprob_chunk_tokens)
        with torch.autocast(hidden.device.type, enabled=False):
            head = get_head(lm)
            hidden = hidden.to(head.weight.dtype)
            logps = gpu_logps if has_gpu_kernels(hidden.device, hidden.dtype) else linear_logps
            return logps(hidden, targets, head, temperature, self.logprob_chunk_tokens)

    def train(self, mode: bool = True) -> "PolicyLM":
        """See `train_in_eval_mode`."""
        return train_in_eval_mode(self, mode)

    def drop_float32_weights(self) -> None:
        """For a policy that does not train: replace the weights by their copies in the dtype of matrix products."""
        if self.copy is not None:
            for parameter in self.lm.parameters():
                if parameter.dtype == torch.float32:
                    parameter.data = round_to(parameter.detach(), self.copy.dtype)
            self.copy = None

    @contextmanager
    def using_own_weights(self) -> Iterator[None]:
        """Compute with the stored weights inside the context, not with copies in half precision."""
        copy, self.copy = self.copy, None
        compute, self.compute = self.compute, Compute(self.compute.device)
        try:
            yield
        finally:
            self.copy, self.compute = copy, compute


@contextmanager
def weights_unchanged(module: nn.Module) -> Iterator[None]:
    """Context in which no weights of a module change, so that they are cast to the compute dtype only once."""
    with ExitStack() as stack:
        for copy in working_copies(module):
            stack.enter_context(copy.weights_unchanged())
        yield


def train_in_eval_mode(unit: Unit, mode: bool) -> Unit:
    """`unit.train(mode)`, but modules that behave differently in train mode stay in eval mode (router noise).

    A policy must give the log-probs that its responses were sampled with. On are only what gradient checkpointing looks
    at, and the dropout in front of adapters, where that is asked for. Lightning warns of modules in eval mode; the
    command line leaves that out.
    """
    for name, module in unit.named_modules():
        needs_train_mode = getattr(module, "gradient_checkpointing", False) or (".lora_dropout." in name)
        module.training = mode and (module is unit or bool(needs_train_mode))
    return unit


def working_copy(model: Any, compute: Compute) -> WorkingCopy | None:
    """A working copy, if matrix products use another dtype than the stored weights and the strategy does not cast."""
    if compute.dtype is None or compute.sharded or compute.dtype == model.dtype:
        return None
    return WorkingCopy(model, compute.dtype)


def without_autocast(device: torch.device, compute: Compute) -> Any:
    """Disable autocast if the weights already have the compute dtype: it would only widen activations."""
    return nullcontext() if compute.dtype is None else torch.autocast(device.type, enabled=False)


def get_head(lm: Any) -> Head:
    """The output head, including the scalings that some architectures add."""
    layer, config = lm.get_output_embeddings(), lm.config.get_text_config()
    scale = 1.0
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        scale *= factor
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        scale /= divisor
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))  # Gemma-2


def head_logits(lm: Any, hidden: Tensor) -> Tensor:
    """Logits of the output head in the dtype of its weights, without autocast.

    bf16 logits near 20 have errors of up to 0.06 nats.

    Args:
        lm: A Hugging Face causal LM.
        hidden: Shape (N, H).

    Returns:
        Shape (N, V), float32.
    """
    layer = lm.get_output_embeddings()
    with torch.autocast(hidden.device.type, enabled=False):
        head = get_head(lm)
        logits = layer(hidden.to(layer.weight.dtype)).float()
        return Head(head.weight, None, head.scale, head.softcap).logits(logits)


def meta_lm(config: Any, trust_remote_code: bool = False, **arguments: Any) -> Any:
    """A causal LM on the meta device; `arguments` are those of `from_config`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(deepcopy(config), trust_remote_code=trust_remote_code, **arguments)


def empty_lm(source: ModelSource) -> Any:
    """The causal LM of `source` on the meta device.

    Raises:
        InputError: transformers has no causal LM of this architecture.
    """
    config = source.config
    try:
        return meta_lm(config, source.trust_remote_code)
    except Exception as error:  # an invalid config can raise any error class in the model's layers
        raise source.build_error("causal LM", error) from error


def check_lm(source: ModelSource) -> None:
    """Refuse a policy whose files are damaged, incomplete or inconsistent. Reads no weights.

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
    """Load the causal LM of `source`, without dropout, in eval mode, and check that `PolicyLM` can run it.

    Args:
        source: The model.
        dtype: Dtype of the weights.
        attn_implementation: Attention implementation of transformers.
        base_dtype: nf4 or fp4 for linear layers in 4 bits, on the current GPU if there is one.
        compute: Device and dtypes of the computation; fast paths are checked for them.
        use_liger_kernel: Whether liger-kernel computes norms, MLPs and rotary embeddings; None for wherever it can.
        read_weights: Whether to read the weights; otherwise the model is on the meta device. 4-bit weights are always
            read.
        longest: Tokens of the run's longest row, whose rotary factors all rows get; None for each row's own.

    Raises:
        InputError: The weights can't be read, or the architecture transforms its logits in an unknown way.
    """
    from transformers import AutoModelForCausalLM

    quantized: dict[str, Any] = {}
    if base_dtype is not None:
        quantized["quantization_config"] = quantization_config(base_dtype, getattr(torch, dtype))
        quantized["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    config = without_dropout(source.config)
    lacks_sdpa = attn_implementation == "sdpa" and not empty_lm(source)._supports_sdpa
    if lacks_sdpa:
        attn_implementation = "eager"  # all such models have it (gpt-oss, GPT-J, Bloom)
    arguments = {"dtype": getattr(torch, dtype), "attn_implementation": attn_implementation}
    if read_weights or quantized:
        lm = load_whole(source, AutoModelForCausalLM, config=config, **arguments, **quantized)
        check_finite(lm, source)
    else:
        lm = meta_lm(config, source.trust_remote_code, **arguments).eval()
    if base_dtype is not None:
        disable_repacking(lm)
    stabilize_rotary(lm, source.config, longest)
    _check_logits(lm, source, compute)
    has_gpu_kernels(compute.device, compute.weights_dtype(lm.dtype))  # checks and reports before the first use
    share_prompts(lm, compute, from_eager=lacks_sdpa)
    apply_liger(lm, compute, use_liger_kernel, source.option)
    return lm


def train_last_layers(lm: Any, count: int, source: ModelSource) -> None:
    """Freeze the embeddings and all decoder layers except the last `count`.

    Raises:
        InputError: The model has fewer layers.
    """
    layers = decoder_layers(lm)
    if count > len(layers):
        raise InputError(f"`model.trainable_layers` is {count}, but {source.path!r} has {len(layers)} layers.")
    for module in (lm.get_input_embeddings(), *layers[: len(layers) - count]):
        module.requires_grad_(False)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a decoder, first to last: the longest list of modules that is not inside another list."""
    found: list[nn.ModuleList] = []
    todo: list[nn.Module] = [model]
    while todo:
        module = todo.pop()
        if isinstance(module, nn.ModuleList):  # lists inside, for example a layer's experts, are not lists of layers
            found.append(module)
        else:
            todo.extend(module.children())
    return list(max(found, key=len, default=()))


def without_dropout(config: Any) -> Any:
    """A copy of a model's config without dropout, layer dropout and rescaling of weights.

    RWKV rescales its weights in eval mode, and the rescaled weights would be trained and exported.
    """
    config = deepcopy(config)
    for key, value in vars(config).items():
        if ("dropout" in key or "layerdrop" in key or key.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, key, 0.0)
    if hasattr(config, RESCALING):
        setattr(config, RESCALING, 0)
    return config


def _check_logits(lm: Any, source: ModelSource, compute: Compute) -> None:
    """Check that our logits equal the model's: a head with an unknown scaling would train on wrong log-probs."""
    try:
        same = cached_check(lm.config, compute, lm.dtype, "logits", lambda: _has_known_logits(lm, source, compute))
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise source.read_error("config", error) from error
    if not same:
        raise InputError(
            f"`{source.option}`: {source.path!r} ({type(lm).__name__}) changes its logits after the output head in an "
            "unsupported way; log-probs would be wrong. Choose another architecture, or open an issue."
        )


@torch.no_grad()
def _has_known_logits(lm: Any, source: ModelSource, compute: Compute) -> bool:
    try:
        small = small_copies(lm.config, compute, lm.dtype, source.trust_remote_code).exact
    except NoCopyError as error:
        if lm.device.type == "meta":
            return True  # checked on the rank that has the weights
        if lm.base_model is lm:  # for example Llama-4's text model
            raise InputError(
                f"`{source.option}`: {type(lm).__name__} has no backbone that returns hidden states without its "
                "output head, which log-probs need. Choose another architecture, or open an issue."
            ) from error
        small = lm
    ids = torch.arange(8, device=small.device).unsqueeze(0) % small.config.get_text_config().vocab_size
    expected = small(input_ids=ids, use_cache=False).logits[0].float()
    if not expected.isfinite().all():
        raise source.read_error("config", ValueError("its numbers give log-probs that are not finite"))
    hidden = small.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    actual = head_logits(small, hidden)
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-3, atol=1e-3)
