"""Runs of policy gradients that are killed inside a round, or that have two ranks, end like one without either."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.test_kill_matrix import (
    TRANSFORMERS,
    assert_same_result,
    make_plan,
    read_result,
    run_driver,
    run_reference,
)

LOSSES = {
    "GRPO with KL": "GRPOLoss --model.loss.clip_low 0.02 --model.loss.clip_high 0.02 --model.loss.kl.coef 0.1",
    "REINFORCE++": "ReinforcePlusPlusLoss --model.kl_coef 0.05",
    "GSPO, split groups": "GSPOLoss --data.max_tokens_per_batch 40",
}
FURTHER = {name: pytest.param(name, marks=pytest.mark.exhaustive) for name in LOSSES}
KILLS: list[dict[str, Any]] = [
    {"event": "before optimizer step", "count": 2, "delay": 0.0},
    {"event": "after training step", "count": 5, "delay": 0.0},
]
STRATEGIES = ("ddp", "fsdp2")


def make_arguments(folder: Path, loss: str) -> dict[str, Any]:
    """The plan of the kill matrix with another loss: two rounds of 8 prompts, two groups an update.

    With 29 end tokens some responses are finished.
    """
    plan = make_plan(folder, TRANSFORMERS, prompts=8)
    file = folder / "llama" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": list(range(1, 30))}))
    arguments = plan["arguments"]
    eta = arguments.index("--model.loss.eta")
    arguments[eta : eta + 2] = ["--model.loss", *loss.split(), "--checkpoint.every_n_updates", "1"]
    return plan


@pytest.mark.slow(minutes=0.5)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["GRPO with KL", FURTHER["REINFORCE++"], FURTHER["GSPO, split groups"]])
def test_killed_inside_a_round_and_started_again(tmp_path: Path, name: str) -> None:
    """Killed in the first round, and again in the middle of an update; the result is bit-identical."""
    plan = make_arguments(tmp_path, LOSSES[name])
    run_reference(tmp_path, plan)
    run = str(tmp_path / "run")
    statuses = run_driver(tmp_path, plan, [*({"dir": run, "kill": kill} for kill in KILLS), {"dir": run}])
    assert statuses == [-9, -9, 0], (tmp_path / "run.log").read_text()[-3000:]
    assert_same_result(tmp_path / "run", read_result(tmp_path / "reference"), name)


@pytest.mark.slow(minutes=0.7)
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", [FURTHER["GRPO with KL"], FURTHER["REINFORCE++"], "GSPO, split groups"])
def test_two_ranks_train_as_one_process_does(tmp_path: Path, name: str) -> None:
    """A round of 7 prompts, so that a rank has no group of its own in the last update."""
    plan = make_arguments(tmp_path, LOSSES[name])
    plan["arguments"] += ["--data.prompts_per_round", "7"]
    runs: list[dict[str, Any]] = [{"dir": str(tmp_path / "one")}]
    for strategy in STRATEGIES:
        more = ["--trainer.devices", "2", "--trainer.strategy", strategy, "--trainer.accumulate_grad_batches", "1"]
        runs.append({"dir": str(tmp_path / strategy), "ranks": 2, "arguments": more})
    assert run_driver(tmp_path, plan, runs) == [0] * len(runs)
    expected = read_result(tmp_path / "one")
    for strategy in STRATEGIES:
        found = read_result(tmp_path / strategy)
        for key, tensor in expected["weights"].items():
            torch.testing.assert_close(found["weights"][key], tensor, rtol=0, atol=2e-5)
        for curve, values in expected["curves"].items():
            if curve.startswith("train/"):
                steps, numbers = zip(*sorted(set(found["curves"][curve])), strict=True)
                assert steps == tuple(step for step, _ in values), curve
                assert numbers == pytest.approx([value for _, value in values], rel=1e-3, abs=1e-4, nan_ok=True), curve
