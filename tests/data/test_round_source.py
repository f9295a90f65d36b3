"""Any object with the two methods of `RoundSource` can prepare the rounds of a DataModule."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L

from rlhf_pl.callbacks import RoundCheckpoint
from rlhf_pl.data.round_source import RoundSource
from rlhf_pl.store.round_store import RoundStore
from tests.integration.test_fit import PROMPTS, assert_same, fit, weights


class CopiedRounds(L.Callback):
    """Copies requested rounds from the directory of another run."""

    def __init__(self, made: Path, run: Path) -> None:
        self.made, self.run = RoundStore(made), RoundStore(run)
        self.prepared: list[int] = []
        self.finished: list[int] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        source: RoundSource = self
        trainer.datamodule.prepare_with(source)  # type: ignore[attr-defined]

    def prepare_round(self, index: int) -> None:
        self.prepared.append(index)
        if not self.run.round(index).path.exists():
            shutil.copytree(self.made.round(index).path, self.run.round(index).path)

    def finish_run(self, rounds: int) -> None:
        self.finished.append(rounds)


def test_copied_rounds_train_the_same_weights(tmp_path: Path, llama: Path, write_jsonl: Callable[..., str]) -> None:
    prompts, none_held_out = write_jsonl(PROMPTS), {"val_prompts": 0}
    _, made = fit(tmp_path / "made", llama, prompts, data=none_held_out)

    def run(**more: Any) -> tuple[CopiedRounds, L.Trainer, Any]:
        copies = CopiedRounds(tmp_path / "made", tmp_path / "run")
        options = {"refresh": {"reward": None}, "data": none_held_out, "enable_checkpointing": True}
        return copies, *fit(tmp_path / "run", llama, prompts, [copies, RoundCheckpoint()], **options, **more)

    copies, trainer, module = run()
    assert (copies.prepared, copies.finished) == ([0, 1], [])
    assert trainer.global_step > 0
    assert_same(weights(module), weights(made))
    again, _, _ = run(ckpt_path=str(tmp_path / "run" / "checkpoints" / "last.ckpt"))
    assert (again.prepared, again.finished) == ([], [2])
