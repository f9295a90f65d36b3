"""A reward model in this process: loaded when first used, run in batches of like length, moved aside when idle."""

from collections.abc import Callable, Sequence, Sized
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from rlhf_pl.models.packed_batch import batches_by_length
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
