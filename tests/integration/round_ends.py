"""A callback of a user, for runs that are killed."""

import json
from pathlib import Path
from typing import Any

import lightning as L


class RoundEndRecorder(L.Callback):
    """Records the metrics at every round's end, and the number of ends so far, which is part of its state."""

    def __init__(self) -> None:
        self.seen = 0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen += 1
        names = ("train/loss", "train/round_kl", "val/loss", "val/reward_mean", "rollout/reward_mean")
        found = {name: float(trainer.callback_metrics[name]) for name in names}
        with (Path(trainer.default_root_dir) / "ends.jsonl").open("a") as file:
            file.write(json.dumps({"round": trainer.current_epoch, "seen": self.seen, **found}) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]
