"""Runs of an earlier version are resumed: finished work is not repeated, and the results are the same."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from rlhf_pl.__main__ import main
from rlhf_pl.rewards import RegexMatch, Sample
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.public_names import public_path
from tests.checkpointing.checkpoint_json import read_json
from tests.checkpointing.stored_run import STORED, restore_inputs, restore_run

# updates done when the run was stopped
DONE = {"scoring": 0, "between": 4, "inside": 6, "lora": 2, "offline": 3, "reward_model": 3, "sft": 2}


class StoredRun:
    """One of the stored runs, restored in the working directory."""

    def __init__(self, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind, self.folder = kind, folder
        self.results: dict[str, Any] = json.loads((STORED / kind / "ends.json").read_text())
        self.updates = 0
        restore_inputs(kind, folder)
        self.run = restore_run(kind, folder)
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, "user_parts", raising=False)  # loaded from another run's folder

    def count_update(self, *_: Any) -> None:
        """Count an optimizer step."""
        self.updates += 1

    def shards(self) -> dict[str, tuple[int, bytes]]:
        """Modification time and content of every shard, by path in the run directory."""
        files = sorted(self.run.rglob("*.parquet"))
        return {str(f.relative_to(self.run)): (f.stat().st_mtime_ns, f.read_bytes()) for f in files}

    def resume(self) -> None:
        """Run the same command again."""
        assert main(["fit", "--config", "run.yaml"]) == 0


@pytest.fixture
def stored(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoredRun]:
    found = StoredRun(request.param, tmp_path, monkeypatch)
    hook = register_optimizer_step_post_hook(found.count_update)
    yield found
    hook.remove()


def shard_names(paths: Any) -> list[str]:
    """Round, stage and number of shards, without the checksums in their file names."""
    return sorted(str(path).removeprefix("run/").rpartition("-")[0] for path in paths)


@pytest.mark.parametrize("stored", DONE, indirect=True)
def test_a_run_resumes_where_an_earlier_version_stopped(stored: StoredRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights are equal up to the rounding of other CPUs; everything else is equal exactly."""
    before, rounds = stored.shards(), RoundStore(stored.run).all_rounds()
    stages = {each.name: each.manifest["stages"] for each in rounds}
    stored.resume()
    output = capsys.readouterr().out
    assert "again" not in output
    assert "anew" not in output
    assert before.items() <= stored.shards().items()
    assert shard_names(stored.shards()) == shard_names(stored.results["files"])
    for each in rounds:
        assert stages[each.name].items() <= each.manifest["stages"].items()
    assert stored.updates == stored.results["updates"] - DONE[stored.kind]
    weights = [load_file(file) for file in sorted((stored.run / "model").rglob("*.safetensors"))]
    found = {name: tensor.flatten() for part in weights for name, tensor in part.items()}
    assert found.keys() == stored.results["weights"].keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, torch.tensor(stored.results["weights"][name]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stored", ["scoring"], indirect=True)
def test_scores_of_an_earlier_version_are_not_computed_again(
    stored: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 of 12 responses were scored, as the journal shows."""
    plain, scored = RegexMatch.one, []

    def one(reward: RegexMatch, sample: Sample) -> float:
        scored.append(sample.response)
        return plain(reward, sample)

    monkeypatch.setattr(RegexMatch, "one", one)
    stored.resume()
    found = RoundStore(stored.run).round(0)
    responses = found.read("responses")["response"].to_pylist()
    assert [response in scored for response in responses] == [False] * 2 + [True] * 10
    assert found.read("rewards")["reward"].to_pylist()[:2] == [0.4, 1.0]  # as in the journal


@pytest.mark.parametrize("stored", ["between"], indirect=True)
def test_manifests_of_a_resumed_run_name_public_classes(stored: StoredRun) -> None:
    manifest = stored.run / "rounds" / "0000" / "manifest.json"
    before = json.loads(manifest.read_text())["settings"]["training"]["loss"]  # a path with a file
    assert before.endswith(".RebelLoss(eta=2.0)")
    assert before.count(".") == 3
    stored.resume()
    for index in range(3):
        settings = RoundStore(stored.run).round(index).manifest["settings"]
        assert settings["training"]["loss"] == "rlhf_pl.RebelLoss(eta=2.0)"
        assert settings["pairs"]["selector"] == "rlhf_pl.BestWorst(min_margin=0.0)"
        assert "0.5 * rlhf_pl.rewards.RegexMatch(column=None" in settings["rewards"]["reward"]
    classes = re.findall(r"class_path: (rlhf_pl\S+)", (stored.run / "config.yaml").read_text())
    assert "rlhf_pl.RebelModule" in classes
    assert classes == [public_path(path) for path in classes]


@pytest.mark.parametrize("stored", ["inside"], indirect=True)
def test_the_config_of_an_earlier_version_resumes_the_same_run(stored: StoredRun) -> None:
    config = (STORED / "inside" / "run" / "config.yaml").read_text()
    (stored.folder / "written.yaml").write_text(config)
    before = stored.shards()
    assert main(["fit", "--config", "written.yaml"]) == 0
    assert before.items() <= stored.shards().items()
    assert stored.updates == stored.results["updates"] - DONE["inside"]


def test_checkpoints_are_restored_exactly() -> None:
    content = read_json(STORED / "inside" / "run" / "checkpoints" / "update-00000006.ckpt.json")
    assert content["global_step"] == 6
    assert content["loops"]["fit_loop"]["epoch_progress"]["current"] == {
        "ready": 2,
        "started": 2,
        "processed": 1,
        "completed": 1,
    }
    moments = content["optimizer_states"][0]["state"]
    assert {state["exp_avg"].dtype for state in moments.values()} == {torch.float32}
    assert [float(state["step"]) for state in moments.values()] == [6.0] * len(moments)
