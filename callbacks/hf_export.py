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
from rlhf_pl.checkpointing.progress import inside_round, rounds_done, stopped_inside
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.models.export_stamp import NOT_EXPORTS, STAMP, file_records, find_damaged_files, read_stamp
from rlhf_pl.modules.export import Exportable, export_dtype
from rlhf_pl.utils.console import console
from rlhf_pl.utils.disk import check_space, naming_a_full_disk
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.fingerprints import weights_fingerprint

FORMAT = 3  # of the folder; those of an earlier one are written again


class HFExport(L.Callback):
    """Writes the trained model as a folder that transformers and vLLM load: safetensors, tokenizer, template, configs.

    Sizes and checksums of its files stand in its `rlhf_pl.json`; a folder that has changed since is written again.

    Args:
        folder: Where to, inside the run directory.
        dtype: Dtype of the weights; null for that of the checkpoint that the run started from, as its tensors have it,
            whatever `model.dtype` and `trainer.precision` it is trained with.
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
                f"`export.folder` is a name of at most 200 letters inside the run directory, other than "
                f"{', '.join(sorted(NOT_EXPORTS))}, got {folder!r}."
            )
        self.folder = folder
        self.dtype = dtype
        self.every_round = every_round
        self._latest = 0  # of the rounds whose models were written by this process

    def _of_round(self, number: int) -> str:
        """Where the model after a round, counted from 1, is written."""
        return f"{self.folder}-round-{number}"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Try everything that an export needs, before anything loads.

        Raises:
            InputError: The model can't be written, or something else lies in the folder's place.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, Exportable):
            raise InputError(f"HFExport works with this package's modules, got {type(pl_module).__name__}.")
        rounds = range(trainer.max_epochs or 0) if self.every_round else ()
        for name in (self.folder, *(self._of_round(index + 1) for index in rounds)):
            _check_place(Path(trainer.default_root_dir) / name)
        self._try(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The model as it was loaded, and room for it in the run directory, which rounds look at again."""
        assert isinstance(pl_module, Exportable)
        ranks_of(trainer).run_on_rank_zero(lambda: self._try(pl_module))
        source = getattr(pl_module, "source", None)
        dtype = None if source is None else export_dtype(source, self.dtype)
        size = sum(t.numel() * (dtype or t.dtype).itemsize for t in pl_module.weights().like.values())
        target = Path(trainer.default_root_dir)
        ranks_of(trainer).run_on_rank_zero(lambda: check_space(target, {"final model": size}, "the export"))

    def _try(self, module: Any) -> None:
        """Modules of others may do without."""
        try_export = getattr(module, "try_export", None)
        if try_export is not None:
            try_export(self.dtype)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_round and not stopped_inside(trainer):
            self._latest = trainer.current_epoch + 1
            self._write(trainer, pl_module, self._of_round(self._latest))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Not at the end of training: a run that was killed while it exported has nothing left to train.

        A run that was finished before looks at its last round's model again, whose weights it has.
        """
        done = rounds_done(trainer)
        target = Path(trainer.default_root_dir) / self._of_round(done)
        again = self.every_round and done != self._latest and not inside_round(trainer)
        if again and ranks_of(trainer).broadcast(target.exists()):
            self._write(trainer, pl_module, self._of_round(done))
        self._write(trainer, pl_module, self.folder)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, name: str) -> None:
        with _averaged(trainer, pl_module):
            refuse_diverged_weights(trainer, pl_module)
            self._write_present(trainer, pl_module, name)

    def _write_present(self, trainer: L.Trainer, pl_module: L.LightningModule, name: str) -> None:
        """Write beside the target and rename, so that a folder of this name is always whole."""
        target = Path(trainer.default_root_dir) / name
        temporary, old = (target.with_name(f".{target.name}.{end}") for end in ("tmp", "old"))
        assert isinstance(pl_module, Exportable)
        stamp = {
            "format": FORMAT,
            "updates": trainer.global_step,
            "dtype": self.dtype,
            "weights": weights_fingerprint(pl_module.weights().stream()),
        }
        ranks = ranks_of(trainer)
        ranks.run_on_rank_zero(lambda: shutil.rmtree(old, ignore_errors=True))
        if ranks.broadcast(trainer.is_global_zero and _is_there(target, stamp)):
            return
        with ranks.phase("exporting the model"), naming_a_full_disk(target):
            try:
                ranks.run_on_rank_zero(lambda: shutil.rmtree(temporary, ignore_errors=True))
                pl_module.export(str(temporary), self.dtype)
                if trainer.is_global_zero:
                    text = json.dumps(stamp | {"files": file_records(temporary)}, indent=1)
                    (temporary / STAMP).write_text(text)
                    _open_by_umask(temporary)
                    if target.exists():  # aside at once: a folder that is half deleted is no export
                        os.replace(target, old)
                    os.replace(temporary, target)
                    shutil.rmtree(old, ignore_errors=True)
            except OSError:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            ranks.barrier()


def _is_there(target: Path, stamp: dict[str, Any]) -> bool:
    """Whether this very export is there, and every file of it as it was written."""
    found = read_stamp(target)
    if found is None or {name: value for name, value in found.items() if name != "files"} != stamp:
        return False
    for file in (damaged := find_damaged_files(target, checksums=True)):
        console.print(f"{file} is not as it was written; exporting anew.", soft_wrap=True)
    return not damaged


def _check_place(target: Path) -> None:
    """Where a folder will be replaced, there must be an export, or nothing."""
    is_ours = target.is_dir() and not target.is_symlink() and ((target / STAMP).exists() or not any(target.iterdir()))
    if (target.exists() or target.is_symlink()) and not is_ours:
        raise InputError(
            f"`export.folder`: {target} is there already, and is no export of this program that could be replaced. "
            "Move it away, or give another name."
        )


def _open_by_umask(folder: Path) -> None:
    """Give files the mode that new ones have here: safetensors leaves them to their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


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
