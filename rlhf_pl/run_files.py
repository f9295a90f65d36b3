"""What a run writes beside its rounds: the log and the resolved config."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from rlhf_pl.disk import write_atomically
from rlhf_pl.ranks import ranks_of
from rlhf_pl.resume import ResumePoint


class RunLogger(TensorBoardLogger):
    """TensorBoard in the run directory, which is written to only once nothing can be refused any more.

    Lightning asks every logger for its `experiment` before it checks anything, which would make the directory.
    """

    ready = False

    @property
    def experiment(self) -> Any:
        if not self.ready:
            raise AttributeError("The run has not passed its checks yet.")
        return super().experiment

    def purge_from(self, step: int) -> None:
        """Hide what an earlier process logged from `step` on: it is logged again."""
        self._kwargs["purge_step"] = step

    def finalize(self, status: str) -> None:
        if self.ready:
            super().finalize(status)


class RunConfig(SaveConfigCallback):
    """Writes the resolved config to the run directory, once nothing can be refused any more."""

    resume_point = ResumePoint(None)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The last callback's setup: the others have made their checks."""
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.ready = True

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        ranks_of(trainer).first(lambda: self._write(Path(trainer.default_root_dir)))

    def _write(self, folder: Path) -> None:
        self.resume_point.commit()
        once = {"repair": False, "accept_changes": False, "ckpt_path": None}  # of this start, not of the run
        config = self.config.clone()
        for key, value in once.items():
            config[key] = value
        text = self.parser.dump(config, skip_none=False)
        write_atomically(folder / "config.yaml", lambda file: file.write(text.encode()))


def keep_csv(folder: Path) -> None:
    """Lightning's CSVLogger deletes the metrics of an earlier process: put them beside the new ones."""
    file = folder / "metrics.csv"
    if file.exists():
        number = len(list(folder.glob("metrics-before-*.csv"))) + 1
        file.rename(folder / f"metrics-before-{number}.csv")
