"""Writes the trained policy as a Hugging Face folder."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L

from rlhf_pl.errors import InputError


class HFExport(L.Callback):
    """Writes the policy as a folder that transformers and vLLM load: safetensors, tokenizer, template, configs.

    Args:
        folder: Where to, inside the run directory.
        dtype: Dtype of the weights; null for that of the model the run started from.
        every_round: Also write `<folder>-round-<n>` after every round.
    """

    def __init__(
        self,
        folder: str = "model",
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        every_round: bool = False,
    ) -> None:
        if not folder or Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise InputError(f"`export.folder` is a name inside the run directory, got {folder!r}.")
        self.folder = folder
        self.dtype = dtype
        self.every_round = every_round

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_round:
            self._write(trainer, pl_module, f"{self.folder}-round-{trainer.current_epoch + 1}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module, self.folder)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, name: str) -> None:
        """Write beside the target and rename, so that a folder of this name is always whole."""
        if not trainer.is_global_zero:
            return
        target = Path(trainer.default_root_dir) / name
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        export: Callable[[str, str | None], None] | Any = getattr(pl_module, "export", None)
        if not callable(export):
            raise InputError(f"HFExport works with modules that have `export`, got {type(pl_module).__name__}.")
        export(str(temporary), self.dtype)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
