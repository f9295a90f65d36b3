"""The resolved config that a run writes to its directory."""

from pathlib import Path

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from rlhf_pl.checkpointing.checkpoints import Progress
from rlhf_pl.checkpointing.resume import ResumePoint
from rlhf_pl.cli.run_loggers import save_versions, start_loggers
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.utils.disk import write_atomically


class RunConfig(SaveConfigCallback):
    """Writes the resolved config to the run directory, once all checks have passed.

    Attributes:
        resume_point: Where the run resumes.
        progress: Progress of its checkpoint, if there is one.
    """

    resume_point = ResumePoint(None)
    progress: Progress | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Do nothing: Lightning would write the config before the checks."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        ranks_of(trainer).run_on_rank_zero(lambda: self._write(Path(trainer.default_root_dir)))
        start_loggers(trainer, self.progress)
        ranks_of(trainer).run_on_rank_zero(lambda: save_versions(trainer))

    def _write(self, folder: Path) -> None:
        self.resume_point.commit()
        once = {"repair": False, "accept_changes": False, "ckpt_path": None}  # options of this start, not of the run
        config = self.config.clone()
        for key, value in once.items():
            config[key] = value
        text = self.parser.dump(config, skip_none=False)
        write_atomically(folder / "config.yaml", lambda file: file.write(text.encode()))
