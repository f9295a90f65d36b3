"""Runs of several processes on the CPU: the same as one process, however they shard, and whatever dies."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_pl.store.round_store import RoundStore
from tests.integration.test_kill_matrix import TRANSFORMERS, make_plan, outcomes, result

pytestmark = pytest.mark.xdist_group("ranks")  # they share what takes long to start
STRATEGIES = {"ddp": "ddp", "fsdp": "fsdp", "fsdp2": "fsdp2"}
FOUR = ("ddp", "fsdp2")  # strategies on four ranks from the start; fsdp goes on with four
PAIRS_PER_UPDATE = 4
KILLS: dict[str, list[dict[str, Any]]] = {  # which of two ranks dies, when; it dies as if it were pulled out
    "ddp": [
        {"rank": 1, "event": "answers to a prompt", "count": 12, "delay": 0.0},
        {"rank": 0, "event": "before optimizer step", "count": 5, "delay": 0.0},  # inside the second round
    ],
    "fsdp": [
        {"rank": 0, "event": "before reward call", "count": 8, "delay": 0.0},
        {"rank": 1, "event": "before optimizer step", "count": 5, "delay": 0.0},
    ],
    "fsdp2": [
        {"rank": 0, "event": "before evaluation", "count": 2, "delay": 0.0},  # at the first round's end
        {"rank": 1, "event": "before optimizer step", "count": 2, "delay": 0.0},
    ],
}


def spread(strategy: str, ranks: int) -> list[str]:
    """Arguments for a run over some ranks whose updates have `PAIRS_PER_UPDATE` pairs."""
    accumulate = ["--trainer.accumulate_grad_batches", str(PAIRS_PER_UPDATE // ranks)]
    return ["--trainer.devices", str(ranks), "--trainer.strategy", strategy, *accumulate]


def a_run(folder: Path, name: str, strategy: str, ranks: int, **more: Any) -> dict[str, Any]:
    return {"dir": str(folder / name), "ranks": ranks, "arguments": spread(strategy, ranks)} | more


def carry_out(folder: Path, runs: list[dict[str, Any]]) -> None:
    """Every run has to come to its end; where a rank is killed, the others say so and end within a minute."""
    settings = [*TRANSFORMERS, "--rollout.prompts_per_shard", "3", "--checkpoint.every_n_updates", "1"]
    plan = make_plan(folder, settings)
    for run, outcome in zip(runs, outcomes(folder, plan, runs), strict=True):
        log = Path(run["dir"] + ".log").read_text()
        if "kill" not in run:
            assert outcome["every"] == [0] * run["ranks"], log
            continue
        rank = run["kill"]["rank"]
        assert outcome["every"] == [-9 if rank == r else 1 for r in range(run["ranks"])], log
        assert outcome["lived_on"] < 60, log
        said = [line for line in log.splitlines() if line.startswith("error:") and "has died" in line]
        assert any(f"rank {rank}" in line for line in said), log


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, and every strategy on two."""
    folder = tmp_path_factory.mktemp("ranks")
    carry_out(folder, [a_run(folder, "one", "auto", 1), *(a_run(folder, f"{s}-2", s, 2) for s in STRATEGIES)])
    return folder


@pytest.fixture(scope="module")
def killed(folder: Path) -> Path:
    """Two strategies on four ranks; every one on two, killed twice, and then resumed on two ranks and on others."""
    runs = [a_run(folder, f"{s}-4", s, 4) for s in FOUR]
    for s, other in zip(STRATEGIES, (1, 4, 1), strict=True):
        runs += [a_run(folder, f"{s}-killed", s, 2, kill=kill) for kill in KILLS[s]]
        runs.append(a_run(folder, f"{s}-other", s, other, copy_of=str(folder / f"{s}-killed")))
        runs.append(a_run(folder, f"{s}-killed", s, 2))
    carry_out(folder, runs)
    return folder


def assert_close(run: Path, expected: Path) -> None:
    """Up to the order of sums in float32."""
    found, wanted = result(run), result(expected)
    assert found["leftovers"] == []
    for name, curve in wanted["curves"].items():
        if name.startswith("train/"):
            steps, values = zip(*sorted(set(found["curves"][name])), strict=True)
            assert steps == tuple(step for step, _ in curve), name
            assert values == pytest.approx([value for _, value in curve], rel=1e-3, abs=1e-4), name
    for name, tensor in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name], tensor, rtol=0, atol=2e-5)
    for index in range(2):
        pairs, same = (RoundStore(where).round(index).read("pairs") for where in (run, expected))
        assert pairs.equals(same)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_as_one_process_does(folder: Path, strategy: str) -> None:
    assert_close(folder / f"{strategy}-2", folder / "one")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_finds_the_new_policys_kl(folder: Path, strategy: str) -> None:
    """What trains of the old policy takes the new one's place for a pass, in shards too."""
    for version in (1, 2):
        found, expected = (RoundStore(folder / f"{n}").held_out(version).info("kl") for n in (f"{strategy}-2", "one"))
        assert expected["new_old"] != 0
        assert found["new_old"] == pytest.approx(expected["new_old"], rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_rank_answers_its_share(folder: Path, strategy: str) -> None:
    stored = RoundStore(folder / f"{strategy}-2").round(0)
    assert len(stored.shards("responses")) == len(stored.shards("rewards")) == 4


def test_the_model_of_a_sharded_run_loads_in_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "fsdp-2" / "model")
    saved = load_file(folder / "fsdp-2" / "model" / "model.safetensors")
    assert torch.equal(model.state_dict()["model.norm.weight"], saved["model.norm.weight"])


@pytest.mark.slow(minutes=2.5)
@pytest.mark.parametrize("strategy", FOUR)
def test_four_ranks_train_as_one_process_does(killed: Path, strategy: str) -> None:
    assert_close(killed / f"{strategy}-4", killed / "one")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_whose_rank_died_goes_on_to_the_last_bit(killed: Path, strategy: str) -> None:
    """Once while responses were drawn or scored, or at a round's end, and once in the middle of a round's training."""
    resumed, expected = killed / f"{strategy}-killed", killed / f"{strategy}-2"
    weights, wanted = (load_file(run / "model" / "model.safetensors") for run in (resumed, expected))
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert_close(resumed, expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_goes_on_with_another_number_of_ranks_in_the_middle_of_a_round(killed: Path, strategy: str) -> None:
    assert_close(killed / f"{strategy}-other", killed / "one")
