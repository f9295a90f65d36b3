"""Writes the trained model as a Hugging Face folder."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging

from rlhf_pl.data.progress import stopped_inside
from rlhf_pl.disk import naming_a_full_disk
from rlhf_pl.errors import InputError
from rlhf_pl.export import Exportable
from rlhf_pl.fingerprints import weights_fingerprint
from rlhf_pl.ranks import ranks_of

STAMP = "rlhf_pl.json"


class HFExport(L.Callback):
    """Writes the trained model as a folder that transformers and vLLM load: safetensors, tokenizer, template, configs.

    Args:
        folder: Where to, inside the run directory.
        dtype: Dtype of the weights; null for that of the model the run started from.
        every_round: Also write `<folder>-round-<n>` after every round (epoch).
    """

    def __init__(
        self,
        folder: str = "model",
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        every_round: bool = False,
    ) -> None:
        if not folder.strip() or Path(folder).is_absolute() or ".." in Path(folder).parts or len(folder) > 200:
            raise InputError(
                f"`export.folder` is a name of at most 200 letters inside the run directory, got {folder!r}."
            )
        self.folder = folder
        self.dtype = dtype
        self.every_round = every_round

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_round and not stopped_inside(trainer):
            self._write(trainer, pl_module, f"{self.folder}-round-{trainer.current_epoch + 1}")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Not at the end of training: a run that was killed while it exported has nothing left to train."""
        self._write(trainer, pl_module, self.folder)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, name: str) -> None:
        with _averaged(trainer, pl_module):
            self._write_present(trainer, pl_module, name)

    def _write_present(self, trainer: L.Trainer, pl_module: L.LightningModule, name: str) -> None:
        """Write beside the target and rename, so that a folder of this name is always whole."""
        target = Path(trainer.default_root_dir) / name
        if not isinstance(pl_module, Exportable):
            raise InputError(f"HFExport works with this package's modules, got {type(pl_module).__name__}.")
        stamp = {
            "updates": trainer.global_step,
            "dtype": self.dtype,
            "weights": weights_fingerprint(pl_module.weights().stream()),
        }
        ranks = ranks_of(trainer)
        if ranks.share(_stamp_of(target) == stamp):
            return
        temporary = target.with_name(f".{target.name}.tmp")
        with ranks.phase("exporting the model"), naming_a_full_disk(target):
            try:
                ranks.first(lambda: shutil.rmtree(temporary, ignore_errors=True))
                pl_module.export(str(temporary), self.dtype)
                if trainer.is_global_zero:
                    (temporary / STAMP).write_text(json.dumps(stamp))
                    if target.exists():
                        shutil.rmtree(target)
                    os.replace(temporary, target)
            except OSError:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            ranks.wait()


@contextmanager
def _averaged(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """In which the module has the averaged weights of a WeightAveraging callback, if there is one.

    Lightning copies them at the end of training, but not in a finished run that is started again.
    """
    everything: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    averages = [c for c in everything if isinstance(c, WeightAveraging) and c._average_model is not None]
    for callback in averages:
        callback._swap_models(module)
    try:
        yield
    finally:
        for callback in averages:
            callback._swap_models(module)


def _stamp_of(folder: Path) -> Any:
    """What the export that is there was made from, if there is one."""
    try:
        return json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return None
