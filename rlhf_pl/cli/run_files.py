"""The resolved config that a run writes to its directory."""

from pathlib import Path

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from rlhf_pl.checkpointing.resume import ResumePoint
from rlhf_pl.trainer.start import RunStart
from rlhf_pl.utils.disk import write_atomically


class RunConfig(SaveConfigCallback):
    """Writes the resolved config to the run directory, once all checks have passed.

    Attributes:
        start: How the run starts.
    """

    start = RunStart(ResumePoint(None))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Do nothing: Lightning would write the config before the checks."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start.begin(trainer, lambda: self._write(Path(trainer.default_root_dir)))

    def _write(self, folder: Path) -> None:
        once = {"repair": False, "accept_changes": False, "ckpt_path": None}  # options of this start, not of the run
        config = self.config.clone()
        for key, value in once.items():
            config[key] = value
        text = self.parser.dump(config, skip_none=False)
        write_atomically(folder / "config.yaml", lambda file: file.write(text.encode()))
