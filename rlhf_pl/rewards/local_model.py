"""Reward models in this process: loaded at first use, run on batches of similar length, moved off the GPU when idle."""

from abc import abstractmethod
from collections.abc import Callable, Sequence, Sized
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from rlhf_pl.models.packed_batch import batches_by_length
from rlhf_pl.models.pretrained_files import WeightFiles
from rlhf_pl.models.rendering import Rendered, Renderer, SystemPrompt
from rlhf_pl.models.source import ModelSource
from rlhf_pl.rewards.base import Reward, Sample
from rlhf_pl.rewards.response_groups import ResponseGroup, group_responses
from rlhf_pl.utils.devices import fast_dtype
from rlhf_pl.utils.errors import InputError, first_line

T = TypeVar("T", bound=Sized)
ModelDType = Literal["float32", "bfloat16", "float16"]


class LocalModel(Generic[T]):
    """Runs a module on any number of rows in batches. A row is anything whose length is a number of tokens.

    Args:
        load: Loads the module on the CPU.
        run: (module, rows of a batch, device) -> an output per row, as tensors or as the rows of a tensor.
        device: `auto` (the GPU if there is one), or a device of torch.
        tokens_per_batch: Padded tokens per batch.
        offload: Whether `release_gpu` moves the module to the CPU.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        run: Callable[[nn.Module, list[T], torch.device], Sequence[Tensor] | Tensor],
        device: str,
        tokens_per_batch: int,
        offload: bool,
    ) -> None:
        try:
            self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        except RuntimeError as error:
            message = f"`rollout.reward.device`: {device!r} is not a device: {first_line(error)}."
            raise InputError(message) from error
        if tokens_per_batch < 1:
            raise InputError(f"`rollout.reward.tokens_per_batch` must be 1 or more, got {tokens_per_batch}.")
        self._load, self._run = load, run
        self.tokens_per_batch, self.offload = tokens_per_batch, offload
        self._module: nn.Module | None = None

    def open(self) -> nn.Module:
        """Load the module if necessary, and move it to its device."""
        if self._module is None:
            self._module = self._load().requires_grad_(False).eval()
        return self._module.to(self.device)

    def __call__(self, rows: Sequence[T]) -> list[Tensor]:
        """Run the module: its outputs in the order of `rows`, float32, on the CPU."""
        module = self.open()
        outputs: dict[int, Tensor] = {}
        with torch.inference_mode():
            for batch in batches_by_length(rows, self.tokens_per_batch):
                batch_outputs = self._run(module, [rows[i] for i in batch], self.device)
                outputs |= {i: output.float().cpu() for i, output in zip(batch, batch_outputs, strict=True)}
        return [outputs[i] for i in range(len(rows))]

    def release_gpu(self) -> None:
        """Move the module to the CPU until the next call, if `offload` is set."""
        if self._module is not None and self.offload and self.device.type != "cpu":
            self._module = self._module.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def close(self) -> None:
        """Drop the weights."""
        self._module = None


class LocalModelReward(Reward):
    """A reward model in this process. A subclass loads the model and turns its outputs into rewards.

    Args:
        weights: Source of the weights.
        source: Source of config and tokenizer.
        dtype: Data type of the weights; None for the checkpoint's.
        device: `auto` (the GPU if there is one), or a device of torch.
        max_tokens: Longer conversations are truncated on the left of the prompt.
        tokens_per_batch: Padded tokens per batch.
        system_prompt: `keep` or `drop` system messages.
        offload: Whether the weights are kept on the CPU while the policy trains.
        attn_implementation: Attention implementation of transformers.
        use_liger_kernel: Whether liger-kernel computes norms, MLPs and rotary embeddings; None to use it where it can.
    """

    def __init__(
        self,
        weights: ModelSource,
        source: ModelSource,
        *,
        dtype: ModelDType | None,
        device: str,
        max_tokens: int,
        tokens_per_batch: int,
        system_prompt: SystemPrompt,
        offload: bool,
        attn_implementation: str,
        use_liger_kernel: bool | None,
    ) -> None:
        self.weights, self.source = weights, source
        # public attributes with plain values are part of the fingerprint
        self.model, self.revision, self.chat_template = weights.path, weights.revision, weights.chat_template
        self.dtype, self.max_tokens, self.system_prompt = dtype, max_tokens, system_prompt
        self.attn_implementation, self.use_liger_kernel = attn_implementation, use_liger_kernel
        self._local = LocalModel(self._load, self.forward, device, tokens_per_batch, offload)

    @abstractmethod
    def load(self, dtype: str | None, device: torch.device) -> nn.Module:
        """Load the model on the CPU.

        Args:
            dtype: Data type of its weights; None for the checkpoint's.
            device: Device on which it will run.
        """

    @abstractmethod
    def forward(self, module: Any, groups: list[ResponseGroup], device: torch.device) -> list[Tensor]:
        """Run the model: a tensor per group, with a row per response."""

    @abstractmethod
    def make_renderer(self, max_tokens: int) -> Renderer:
        """Make a renderer of conversations for the model.

        Args:
            max_tokens: Maximum length of a conversation, tokens.
        """

    @property
    def name(self) -> str:
        return f"{type(self).__name__}({self.model})"

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}:{self._weights_hash}"

    @cached_property
    def _weights_hash(self) -> str:
        return WeightFiles(self.weights).fingerprint()

    @cached_property
    def _renderer(self) -> Renderer:
        return self.make_renderer(min(self.max_tokens, self.source.max_context_tokens))

    def renderer(self) -> Renderer:
        """The renderer of conversations for the model."""
        return self._renderer

    def run(self, batch: Sequence[Sample], rows: Sequence[Rendered]) -> list[Tensor]:
        """Run the model on samples and their rows: a float32 tensor per group, in order."""
        return self._local(group_responses(batch, rows, self.source.config))

    def open(self) -> None:
        self._local.open()

    def release_gpu(self) -> None:
        self._local.release_gpu()

    def close(self) -> None:
        self._local.close()

    def _load(self) -> nn.Module:
        return self.load(fast_dtype(self.dtype, self._local.device.type), self._local.device)
