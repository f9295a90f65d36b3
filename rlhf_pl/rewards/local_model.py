"""Reward models in this process: loaded when first used, run in batches of like length, moved aside when idle."""

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
from rlhf_pl.rewards.families import Family, families
from rlhf_pl.utils.devices import fast_dtype
from rlhf_pl.utils.errors import InputError

T = TypeVar("T", bound=Sized)
ModelDType = Literal["float32", "bfloat16", "float16"]


class LocalModel(Generic[T]):
    """Runs a module over rows, whatever has a number of tokens, in batches, whatever their number and lengths.

    Args:
        load: Makes the module, on the CPU.
        run: (module, rows of a batch, device) -> an output for each row: the rows of a tensor, or tensors.
        device: `auto` for the GPU where there is one.
        tokens_per_batch: Padded tokens of a batch.
        offload: Move to the CPU in `rest`.
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
            raise InputError(
                f"`rollout.reward.device`: {device!r} is no device: {str(error).splitlines()[0]}"
            ) from error
        if tokens_per_batch < 1:
            raise InputError(f"`rollout.reward.tokens_per_batch` must be 1 or more, got {tokens_per_batch}.")
        self._load, self._run = load, run
        self.tokens_per_batch, self.offload = tokens_per_batch, offload
        self._module: nn.Module | None = None

    def open(self) -> nn.Module:
        """The module on its device, loaded if it is not yet."""
        if self._module is None:
            self._module = self._load().requires_grad_(False).eval()
        return self._module.to(self.device)

    def __call__(self, rows: Sequence[T]) -> list[Tensor]:
        """The module's outputs in the order of `rows`, float32, on the CPU."""
        module = self.open()
        found: dict[int, Tensor] = {}
        with torch.inference_mode():
            for batch in batches_by_length(rows, self.tokens_per_batch):
                outputs = self._run(module, [rows[i] for i in batch], self.device)
                found |= {i: output.float().cpu() for i, output in zip(batch, outputs, strict=True)}
        return [found[i] for i in range(len(rows))]

    def release_gpu(self) -> None:
        """Leave the GPU to others until the next call."""
        if self._module is not None and self.offload and self.device.type != "cpu":
            self._module = self._module.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def close(self) -> None:
        """Drop the weights."""
        self._module = None


class LocalModelReward(Reward):
    """A reward by a model in this process. A subclass says how the model is loaded, and what its outputs mean.

    Args:
        weights: Where the weights come from.
        source: Where config and tokenizer come from.
        dtype: Of the weights; None for that of the checkpoint.
        device: `auto` for the GPU where there is one.
        max_tokens: Longer conversations are truncated on the left of the prompt.
        tokens_per_batch: Padded tokens of a batch.
        system_prompt: `keep` or `drop` system messages.
        offload: Whether the weights are on the CPU while the policy trains.
        attn_implementation: Attention of transformers.
        use_liger_kernel: Whether liger-kernel computes norms, MLPs and rotary embeddings; None for wherever it can.
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
        # what is public and plain here is in the fingerprint
        self.model, self.revision, self.chat_template = weights.path, weights.revision, weights.chat_template
        self.dtype, self.max_tokens, self.system_prompt = dtype, max_tokens, system_prompt
        self.attn_implementation, self.use_liger_kernel = attn_implementation, use_liger_kernel
        self._local = LocalModel(self._load, self.forward, device, tokens_per_batch, offload)

    @abstractmethod
    def load(self, dtype: str | None, device: torch.device) -> nn.Module:
        """The model on the CPU.

        Args:
            dtype: Of its weights; None for that of the checkpoint.
            device: Where it will compute.
        """

    @abstractmethod
    def forward(self, module: Any, found: list[Family], device: torch.device) -> list[Tensor]:
        """The model's outputs for the responses of each family, a row each."""

    @abstractmethod
    def make_renderer(self, max_tokens: int) -> Renderer:
        """Renders conversations of up to `max_tokens` as the model reads them."""

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
        """Renders conversations as the model reads them."""
        return self._renderer

    def run(self, batch: Sequence[Sample], rows: Sequence[Rendered]) -> list[Tensor]:
        """The model's outputs for samples with their rows, float32: a tensor for each family, in their order."""
        return self._local(families(batch, rows, self.source.config))

    def open(self) -> None:
        self._local.open()

    def release_gpu(self) -> None:
        self._local.release_gpu()

    def close(self) -> None:
        self._local.close()

    def _load(self) -> nn.Module:
        return self.load(fast_dtype(self.dtype, self._local.device.type), self._local.device)
