"""Runs of several processes on the CPU equal one process under every strategy, also after a rank has died."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_pl.store.round_store import RoundStore
from tests.integration.test_kill_matrix import TRANSFORMERS, make_plan, outcomes, read_result

pytestmark = pytest.mark.xdist_group("ranks")  # they share slow fixtures
STRATEGIES = {"ddp": "ddp", "fsdp": "fsdp", "fsdp2": "fsdp2"}
FOUR = ("ddp", "fsdp2")  # strategies on four ranks from the start; fsdp resumes on four
PAIRS_PER_UPDATE = 4
KILLS: dict[str, list[dict[str, Any]]] = {  # the rank of two that is killed, and when
    "ddp": [
        {"rank": 1, "event": "responses to a prompt", "count": 12, "delay": 0.0},
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


def rank_arguments(strategy: str, ranks: int) -> list[str]:
    """Arguments for a run on `ranks` ranks whose updates have `PAIRS_PER_UPDATE` pairs."""
    accumulate = ["--trainer.accumulate_grad_batches", str(PAIRS_PER_UPDATE // ranks)]
    return ["--trainer.devices", str(ranks), "--trainer.strategy", strategy, *accumulate]


def make_run(folder: Path, name: str, strategy: str, ranks: int, **more: Any) -> dict[str, Any]:
    return {"dir": str(folder / name), "ranks": ranks, "arguments": rank_arguments(strategy, ranks)} | more


def carry_out(folder: Path, runs: list[dict[str, Any]]) -> None:
    """Carry out the runs. Each must finish; where a rank is killed, the others report it and end within a minute."""
    settings = [*TRANSFORMERS, "--rollout.prompts_per_shard", "3", "--checkpoint.every_n_updates", "1"]
    plan = make_plan(folder, settings)
    for run, outcome in zip(runs, outcomes(folder, plan, runs), strict=True):
        log = Path(run["dir"] + ".log").read_text()
        if "kill" not in run:
            assert outcome["every"] == [0] * run["ranks"], log
            continue
        rank = run["kill"]["rank"]
        assert outcome["every"] == [-9 if rank == r else 1 for r in range(run["ranks"])], log
        assert outcome["seconds_after"] < 60, log
        reports = [line for line in log.splitlines() if line.startswith("error:") and "has died" in line]
        assert any(f"rank {rank}" in line for line in reports), log


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process, and of every strategy on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = [make_run(folder, "one", "auto", 1), *(make_run(folder, f"{s}-2", s, 2) for s in STRATEGIES)]
    again = make_run(folder, "again-2", "ddp", 2)  # on the stored rounds of the first run
    again["arguments"] += ["--rounds_from", str(folder / "one"), "--rollout.evaluate", "true"]
    carry_out(folder, [*runs, again])
    return folder


@pytest.fixture(scope="module")
def killed(folder: Path) -> Path:
    """Two strategies on four ranks; every strategy on two, killed twice, then resumed on two and on others."""
    runs = [make_run(folder, f"{s}-4", s, 4) for s in FOUR]
    for s, other in zip(STRATEGIES, (1, 4, 1), strict=True):
        runs += [make_run(folder, f"{s}-killed", s, 2, kill=kill) for kill in KILLS[s]]
        runs.append(make_run(folder, f"{s}-other", s, other, copy_of=str(folder / f"{s}-killed")))
        runs.append(make_run(folder, f"{s}-killed", s, 2))
    carry_out(folder, runs)
    return folder


def assert_close(run: Path, expected: Path) -> None:
    """Compare two runs up to the order of sums in float32."""
    found, reference = read_result(run), read_result(expected)
    assert found["leftovers"] == []
    for name, curve in reference["curves"].items():
        if name.startswith("train/"):
            steps, values = zip(*sorted(set(found["curves"][name])), strict=True)
            assert steps == tuple(step for step, _ in curve), name
            assert values == pytest.approx([value for _, value in curve], rel=1e-3, abs=1e-4), name
    for name, tensor in reference["weights"].items():
        torch.testing.assert_close(found["weights"][name], tensor, rtol=0, atol=2e-5)
    for index in range(2):
        pairs, same = (RoundStore(where).round(index).read("pairs") for where in (run, expected))
        assert pairs.equals(same)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_as_one_process_does(folder: Path, strategy: str) -> None:
    assert_close(folder / f"{strategy}-2", folder / "one")


def test_two_ranks_train_again_on_the_rounds_of_one_process(folder: Path) -> None:
    weights, expected = (read_result(folder / name)["weights"] for name in ("again-2", "one"))
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=2e-5)
    for index in range(2):
        found, original = (RoundStore(folder / name).round(index) for name in ("again-2", "one"))
        assert found.read("responses").equals(original.read("responses"))
        assert found.manifest["rounds_from"]["off_policy"] == (index > 0)  # sums on two ranks round differently


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_measures_the_new_policys_kl(folder: Path, strategy: str) -> None:
    """The trained weights of pi_old replace the new ones for a forward pass, also when sharded."""
    for version in (1, 2):
        found, expected = (RoundStore(folder / f"{n}").held_out(version).info("kl") for n in (f"{strategy}-2", "one"))
        assert expected["new_old"] != 0
        assert found["new_old"] == pytest.approx(expected["new_old"], rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_rank_generates_its_share(folder: Path, strategy: str) -> None:
    stored = RoundStore(folder / f"{strategy}-2").round(0)
    assert len(stored.shards("responses")) == len(stored.shards("rewards")) == 4


def test_the_model_of_a_sharded_run_loads_in_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "fsdp-2" / "model")
    saved = load_file(folder / "fsdp-2" / "model" / "model.safetensors")
    assert torch.equal(model.state_dict()["model.norm.weight"], saved["model.norm.weight"])


@pytest.mark.exhaustive
@pytest.mark.slow(minutes=2.5)
@pytest.mark.parametrize("strategy", FOUR)
def test_four_ranks_train_as_one_process_does(killed: Path, strategy: str) -> None:
    assert_close(killed / f"{strategy}-4", killed / "one")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_resumes_bit_identically_after_a_rank_has_died(killed: Path, strategy: str) -> None:
    """Killed while responses were sampled or scored, or at a round's end, and again in the middle of training."""
    resumed, expected = killed / f"{strategy}-killed", killed / f"{strategy}-2"
    weights, wanted = (load_file(run / "model" / "model.safetensors") for run in (resumed, expected))
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert_close(resumed, expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_resumes_on_another_number_of_ranks_in_the_middle_of_a_round(killed: Path, strategy: str) -> None:
    assert_close(killed / f"{strategy}-other", killed / "one")
