"""Restores a stored run to its state when it was stopped."""

import os
import shutil
from pathlib import Path

import torch

from tests.checkpointing.checkpoint_json import read_json

STORED = Path(__file__).parent / "stored_runs"


def restore_inputs(kind: str, folder: Path) -> None:
    """Restore the run's model, data, user code and config."""
    from safetensors.torch import save_file

    shutil.copytree(STORED / "model", folder / "model", ignore=shutil.ignore_patterns("weights.json"))
    save_file(read_json(STORED / "model" / "weights.json"), folder / "model" / "model.safetensors", {"format": "pt"})
    shutil.copytree(STORED / "inputs", folder, dirs_exist_ok=True)
    shutil.copyfile(STORED / kind / "run.yaml", folder / "run.yaml")


def restore_run(kind: str, folder: Path) -> Path:
    """Restore the run directory, with checkpoints from their JSON. Return its path."""
    run = folder / "run"
    shutil.copytree(STORED / kind / "run", run)
    for file in sorted(run.rglob("*.ckpt.json")):
        torch.save(read_json(file), file.with_suffix(""))
        file.unlink()
    for file in sorted(run.rglob("*.link")):
        os.symlink(file.read_text().strip(), file.with_suffix(""))
        file.unlink()
    return run
