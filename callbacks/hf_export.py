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

from rlhf_pl.checkpointing.divergence import refuse_diverged_weights
from rlhf_pl.checkpointing.progress import has_stopped_inside, is_inside_round, rounds_done
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.models.export_stamp import NOT_EXPORTS, STAMP, file_records, find_damaged_files, read_stamp
from rlhf_pl.modules.export import Exportable, export_dtype
from rlhf_pl.utils.console import console
from rlhf_pl.utils.disk import check_space, translate_full_disk
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.fingerprints import weights_fingerprint

FORMAT = 3  # of the folder; folders in an earlier format are written again


class HFExport(L.Callback):
    """Writes the trained model as a folder that transformers and vLLM load: safetensors, tokenizer, template, configs.

    The folder's `rlhf_pl.json` lists sizes and checksums of its files; a folder that has changed is written again.

    Args:
        folder: The target, inside the run directory.
        dtype: Dtype of the weights; null for that of the tensors in the checkpoint that the run started from,
            independent of `model.dtype` and `trainer.precision`.
        every_round: Also write `<folder>-round-<n>` after every round (epoch).
    """

    def __init__(
        self,
        folder: str = "model",
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        every_round: bool = False,
    ) -> None:
        parts = Path(folder.strip()).parts
        if not parts or Path(folder).is_absolute() or ".." in parts or len(folder) > 200 or parts[0] in NOT_EXPORTS:
            raise InputError(
                f"`export.folder` must be a name of at most 200 letters inside the run directory, other than "
                f"{', '.join(sorted(NOT_EXPORTS))}, got {folder!r}."
            )
        self.folder = folder
        self.dtype = dtype
        self.every_round = every_round
        self._latest = 0  # number of the last round whose model this process has written

    def _round_folder(self, number: int) -> str:
        """Name of the folder of the model after a round; rounds count from 1."""
        return f"{self.folder}-round-{number}"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Try everything that an export needs, before any weights load.

        Raises:
            InputError: The model can't be written, or the folder exists and is not an export.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, Exportable):
            raise InputError(f"HFExport works with this package's modules, got {type(pl_module).__name__}.")
        rounds = range(trainer.max_epochs or 0) if self.every_round else ()
        for name in (self.folder, *(self._round_folder(index + 1) for index in rounds)):
            _check_target(Path(trainer.default_root_dir) / name)
        self._try_export(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Try the export of the loaded model, and check the disk space for it; rounds check the space again."""
        assert isinstance(pl_module, Exportable)
        ranks_of(trainer).run_on_rank_zero(lambda: self._try_export(pl_module))
        source = getattr(pl_module, "source", None)
        dtype = None if source is None else export_dtype(source, self.dtype)
        size = sum(t.numel() * (dtype or t.dtype).itemsize for t in pl_module.weights().like.values())
        target = Path(trainer.default_root_dir)
        ranks_of(trainer).run_on_rank_zero(lambda: check_space(target, {"final model": size}, "the export"))

    def _try_export(self, module: Any) -> None:
        """Try an export where the module supports it; users' modules may not."""
        try_export = getattr(module, "try_export", None)
        if try_export is not None:
            try_export(self.dtype)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_round and not has_stopped_inside(trainer):
            self._latest = trainer.current_epoch + 1
            self._write(trainer, pl_module, self._round_folder(self._latest))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export at the end of the fit, not of the training: a run killed during its export has nothing left to train.

        A finished run that is started again also checks its last round's model, whose weights it has.
        """
        done = rounds_done(trainer)
        target = Path(trainer.default_root_dir) / self._round_folder(done)
        is_repeated = self.every_round and done != self._latest and not is_inside_round(trainer)
        if is_repeated and ranks_of(trainer).broadcast(target.exists()):
            self._write(trainer, pl_module, self._round_folder(done))
        self._write(trainer, pl_module, self.folder)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, name: str) -> None:
        with _averaged_weights(trainer, pl_module):
            refuse_diverged_weights(trainer, pl_module)
            self._write_weights(trainer, pl_module, name)

    def _write_weights(self, trainer: L.Trainer, pl_module: L.LightningModule, name: str) -> None:
        """Write beside the target and rename, so that a folder of this name is always complete."""
        target = Path(trainer.default_root_dir) / name
        temporary, old = (target.with_name(f".{target.name}.{end}") for end in ("tmp", "old"))
        assert isinstance(pl_module, Exportable)
        stamp = {
            "format": FORMAT,
            "updates": trainer.global_step,
            "dtype": self.dtype,
            "weights": weights_fingerprint(pl_module.weights().stream()),
            **getattr(pl_module, "export_settings", dict)(),
        }
        ranks = ranks_of(trainer)
        ranks.run_on_rank_zero(lambda: shutil.rmtree(old, ignore_errors=True))
        if ranks.broadcast(trainer.is_global_zero and _is_up_to_date(target, stamp)):
            return
        with ranks.phase("exporting the model"), translate_full_disk(target):
            try:
                ranks.run_on_rank_zero(lambda: shutil.rmtree(temporary, ignore_errors=True))
                pl_module.export(str(temporary), self.dtype)
                if trainer.is_global_zero:
                    text = json.dumps(stamp | {"files": file_records(temporary)}, indent=1)
                    (temporary / STAMP).write_text(text)
                    _apply_umask(temporary)
                    if target.exists():  # renamed in one step: a half-deleted folder is not an export
                        os.replace(target, old)
                    os.replace(temporary, target)
                    shutil.rmtree(old, ignore_errors=True)
            except OSError:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            ranks.barrier()


def _is_up_to_date(target: Path, stamp: dict[str, Any]) -> bool:
    """Whether the target is this export, with every file unchanged."""
    found = read_stamp(target)
    if found is None or {name: value for name, value in found.items() if name != "files"} != stamp:
        return False
    for file in (damaged := find_damaged_files(target, checksums=True)):
        console.print(f"{file} has changed since it was written; exporting again.", soft_wrap=True)
    return not damaged


def _check_target(target: Path) -> None:
    """Refuse a target that exists and is not an export."""
    is_ours = target.is_dir() and not target.is_symlink() and ((target / STAMP).exists() or not any(target.iterdir()))
    if (target.exists() or target.is_symlink()) and not is_ours:
        raise InputError(
            f"`export.folder`: {target} exists already, and is not an export of this program that could be replaced. "
            "Move it away, or give another name."
        )


def _apply_umask(folder: Path) -> None:
    """Give files the default mode of new files: safetensors makes them readable only by their owner."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


@contextmanager
def _averaged_weights(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Context in which the module has the averaged weights of a WeightAveraging callback, if there is one.

    Lightning copies them into the module at the end of training, but not in a finished run that is started again.
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
