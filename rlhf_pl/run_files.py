"""The resolved config that a run writes beside its rounds."""

from pathlib import Path

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from rlhf_pl.checkpoints import Progress
from rlhf_pl.disk import write_atomically
from rlhf_pl.ranks import ranks_of
from rlhf_pl.resume import ResumePoint
from rlhf_pl.run_loggers import note_versions, start_loggers


class RunConfig(SaveConfigCallback):
    """Writes the resolved config to the run directory, once nothing can be refused any more."""

    resume_point = ResumePoint(None)

    progress: Progress | None = None  # of the checkpoint

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Not Lightning's, which writes before everything is checked."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        ranks_of(trainer).first(lambda: self._write(Path(trainer.default_root_dir)))
        start_loggers(trainer, self.progress)
        ranks_of(trainer).first(lambda: note_versions(trainer))

    def _write(self, folder: Path) -> None:
        self.resume_point.commit()
        once = {"repair": False, "accept_changes": False, "ckpt_path": None}  # of this start, not of the run
        config = self.config.clone()
        for key, value in once.items():
            config[key] = value
        text = self.parser.dump(config, skip_none=False)
        write_atomically(folder / "config.yaml", lambda file: file.write(text.encode()))
