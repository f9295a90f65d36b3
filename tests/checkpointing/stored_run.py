"""Lays a stored run out as it was when it was stopped."""

import os
import shutil
from pathlib import Path

import torch

from tests.checkpointing.checkpoint_json import read_json

STORED = Path(__file__).parent / "stored_runs"


def lay_out_inputs(kind: str, folder: Path) -> None:
    """The model, the data, the user's own code and the config that the run was started with."""
    from safetensors.torch import save_file

    shutil.copytree(STORED / "model", folder / "model", ignore=shutil.ignore_patterns("weights.json"))
    save_file(read_json(STORED / "model" / "weights.json"), folder / "model" / "model.safetensors", {"format": "pt"})
    shutil.copytree(STORED / "inputs", folder, dirs_exist_ok=True)
    shutil.copyfile(STORED / kind / "run.yaml", folder / "run.yaml")


def lay_out_run(kind: str, folder: Path) -> Path:
    """The run directory, its checkpoints made from their text; returns where it is."""
    run = folder / "run"
    shutil.copytree(STORED / kind / "run", run)
    for file in sorted(run.rglob("*.ckpt.json")):
        torch.save(read_json(file), file.with_suffix(""))
        file.unlink()
    for file in sorted(run.rglob("*.link")):
        os.symlink(file.read_text().strip(), file.with_suffix(""))
        file.unlink()
    return run
