"""A run that is killed at any moment and started again ends like a run without kills."""

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_pl.store.round_store import RoundStore
from tests.conftest import save_llama

DRIVER = Path(__file__).with_name("kill_driver.py")
TRANSFORMERS = ["--rollout.sampler", "TransformersSampler", "--rollout.sampler.dtype", "float32"]
REWARD = "def score(response):\n    return len(set(response)) / 10\n"
VARYING = ("train/pairs_per_s", "rollout/sampler_logp_error")  # times, and a metric that is logged at every weight sync
AT_ENDS = [
    *("--export.every_round", "true", "--checkpoint.every_n_updates", "0"),
    *("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/reward_mean"),
    *("--trainer.callbacks.patience=9", "--trainer.callbacks+=round_ends.RoundEndRecorder"),
]
TRIAL_CALLS = 6  # on made-up responses, at every start


def make_plan(folder: Path, sampler: list[str], prompts: int = 12) -> dict[str, Any]:
    """Two rounds of 12 prompts in shards of 4, two pairs an update, a checkpoint after every update."""
    model = save_llama(folder / "llama")
    rows = [{"prompt_id": f"p{i}", "prompt": f"What is {i} plus {i + 1}?"} for i in range(2 * prompts + 4)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "reward.py").write_text(REWARD)
    options = {
        **{"model.policy": model, "model.optimizer.lr": "1e-3", "model.loss.eta": "2.0"},
        **{"data.prompts": folder / "prompts.jsonl", "data.prompts_per_round": prompts, "data.val_prompts": 4},
        **{"data.max_prompt_tokens": 64, "data.batch_size": 1, "rollout.reward": f"{folder}/reward.py:score"},
        **{"rollout.sampling.max_response_tokens": 8, "rollout.sampling.num_responses": 3},
        **{"rollout.val_num_responses": 2, "rollout.prompts_per_shard": 4, "checkpoint.every_n_updates": 2},
        **{"trainer.max_epochs": 2, "trainer.accumulate_grad_batches": 2, "trainer.accelerator": "cpu"},
    }
    arguments = ["fit", *(str(text) for name, value in options.items() for text in (f"--{name}", value)), *sampler]
    return {"arguments": arguments, "runs": []}


def run_driver(folder: Path, plan: dict[str, Any], runs: list[dict[str, Any]]) -> list[int]:
    """Carry out the runs; returns their exit codes."""
    return [outcome["status"] for outcome in outcomes(folder, plan, runs)]


def outcomes(folder: Path, plan: dict[str, Any], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Carry out the runs; returns the driver's report of each."""
    (folder / "plan.json").write_text(json.dumps({**plan, "runs": runs}))
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(folder / "plan.json")], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def run_reference(folder: Path, plan: dict[str, Any]) -> list[tuple[float, str, int]]:
    """Carry out a run without a kill; returns its trace."""
    trace = folder / "reference.trace"
    statuses = run_driver(folder, plan, [{"dir": str(folder / "reference"), "trace": str(trace)}])
    assert statuses == [0], (folder / "reference.log").read_text()[-3000:]
    return read_trace(trace)


def read_trace(file: Path) -> list[tuple[float, str, int]]:
    return [tuple(json.loads(line)) for line in file.read_text().splitlines()]


def read_result(run: Path) -> dict[str, Any]:
    """Read everything that must be equal: round files (their names have checksums), loss curve, weights, table."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(
        str(file.relative_to(run))
        for kind in ("rounds", "heldout")
        for file in (run / kind).rglob("*")
        if file.is_file()
    )
    curves = EventAccumulator(str(run / "tensorboard"))
    curves.Reload()
    everything = curves.Tags()["scalars"]
    names = [n for n in everything if n.startswith(("train/", "val/", "rollout/")) and n not in VARYING]
    assert "train/loss" in names
    rounds = [stored.info("training") for stored in RoundStore(run).rounds().values()]
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) if (run / "ends.jsonl").exists() else None
    return {
        "tables": {name: sorted({e.step for e in curves.Tensors(name)}) for name in curves.Tags()["tensors"]},
        "page": (run / "samples.html").read_text(),
        "checkpoints": sorted(file.name for file in (run / "checkpoints").iterdir()),
        "folders": sorted(folder.name for folder in run.iterdir() if folder.is_dir()),
        "ends": sorted(set((run / "ends.jsonl").read_text().splitlines())) if saved else [],
        "states": saved and str(sorted(saved["callbacks"].items())),
        "files": files,
        "curves": {name: [(event.step, event.value) for event in curves.Scalars(name)] for name in names},
        "weights": {
            f"{file.parent.name}/{name}": tensor.clone()
            for file in run.glob("model*/model.safetensors")
            for name, tensor in load_file(file).items()
        },
        "training": [{k: v for k, v in info.items() if k != "seconds"} for info in rounds],
        "leftovers": [str(file) for file in run.rglob(".*.tmp")] + [str(file) for file in run.rglob("*.journal")],
    }


def assert_same_result(run: Path, expected: dict[str, Any], what: str) -> None:
    found = read_result(run)
    assert found["files"] == expected["files"], what
    assert found["leftovers"] == [], what
    assert found["training"] == expected["training"], what
    for name in ("tables", "page", "checkpoints", "folders", "ends", "states"):
        assert found[name] == expected[name], (what, name)
    for name, tensor in expected["weights"].items():
        assert torch.equal(found["weights"][name], tensor), (what, name)
    for name, curve in expected["curves"].items():
        assert sorted(set(found["curves"][name])) == curve, (what, name)


AFTER = ("rename", "reward call", "weight sync", "optimizer step", "checkpoint write", "round checkpoint", "export",
         "update checkpoint", "removal of checkpoints", "evaluation", "samples",
         "write responses of rounds", "write rewards of rounds", "complete training of rounds")  # fmt: skip


def boundary_points(counts: Counter[str]) -> list[dict[str, Any]]:
    """Choose one occurrence of every kind of event, or only its beginning for short events.

    The same code writes files of held-out prompts and of rounds, so only one of the two is used for each event.
    """
    rng = random.Random(1)
    points = [{"event": name, "count": rng.randint(1, count), "delay": 0.0} for name, count in counts.items()]
    twins = [name for name in counts if name.endswith("heldout") and name.replace("heldout", "rounds") in counts]
    left_out = {name if i // 2 % 2 else name.replace("heldout", "rounds") for i, name in enumerate(twins)}
    left_out = {name for name in left_out if name.startswith("before ")}
    kept = [p for p in points if not p["event"].startswith("after ") or p["event"].removeprefix("after ") in AFTER]
    return [p for p in kept if p["event"] not in left_out]


def make_chains(points: list[dict[str, Any]], trace: list[tuple[float, str, int]], length: int) -> list[list[dict]]:
    """Arrange the kills in chains, one per run directory, in the order of the run: each hits the resumed process.

    That process has at least the events that the reference has after the previous kill. Counted from its start, all
    kills hit, though perhaps slightly earlier.
    """
    position = {(name, count): i for i, (_, name, count) in enumerate(trace)}
    ordered = sorted(points, key=lambda p: position[p["event"], p["count"]])
    chains = []
    every = -(-len(ordered) // length)
    for first in range(every):
        chain, killed_at = [], -1
        for point in ordered[first::every]:
            before = sum(name == point["event"] for _, name, _ in trace[: killed_at + 1])
            chain.append(point | {"count": point["count"] - before})
            killed_at = position[point["event"], point["count"]]
        chains.append(chain)
    return chains


def round_end_points(trace: list[tuple[float, str, int]]) -> list[dict[str, Any]]:
    """Choose one event of every kind between a round's last update and its end."""
    names = [name for _, name, _ in trace]
    end = len(names) - names[::-1].index("after round checkpoint")
    begin = max(i for i, name in enumerate(names[:end]) if name == "after optimizer step")
    first = {name: count for _, name, count in reversed(trace[begin:end])}
    return [{"event": name, "count": count, "delay": 0.0} for name, count in first.items()]


def random_moments(trace: list[tuple[float, str, int]], number: int, seed: int) -> list[dict[str, Any]]:
    """Choose random moments after random events, all kinds equally likely, so that short phases count as well."""
    rng = random.Random(seed)
    kinds = sorted({name for _, name, _ in trace})
    points = []
    for _ in range(number):
        kind = rng.choice(kinds)
        position = rng.choice([i for i, event in enumerate(trace[:-1]) if event[1] == kind] or [0])
        gap = trace[position + 1][0] - trace[position][0]
        points.append({"event": trace[position][1], "count": trace[position][2], "delay": rng.random() * gap + 1e-4})
    return points


def run_matrix(folder: Path, plan: dict[str, Any], chains: list[list[dict[str, Any]]], reference: Path) -> int:
    """Kill a run at every point of a chain, start it again each time, compare. Returns the number of kills that hit."""
    runs = [
        {"dir": f"{folder}/run{i}", "kill": kill, "trace": f"{folder}/run{i}.{start}"}
        for i, chain in enumerate(chains)
        for start, kill in enumerate([*chain, None])
    ]
    statuses = iter(run_driver(folder, plan, runs))
    expected = read_result(reference)
    rewards = Counter(n for _, n, _ in read_trace(folder / "reference.trace"))["after reward call"] - TRIAL_CALLS
    hits = 0
    for i, chain in enumerate(chains):
        *killed, resumed = [next(statuses) for _ in [*chain, None]]
        log = (folder / f"run{i}.log").read_text()[-3000:]
        assert set(killed) <= {-9, 0}, (chain, killed, log)
        assert resumed == 0, (chain, log)
        hits += killed.count(-9)
        assert_same_result(folder / f"run{i}", expected, str(chain))
        traces = [read_trace(folder / f"run{i}.{start}") for start in range(len(chain) + 1)]
        calls = [Counter(n for _, n, _ in trace)["after reward call"] for trace in traces]
        assert sum(max(0, c - TRIAL_CALLS) for c in calls) <= rewards + len(chain), (chain, "scored twice")
    return hits


def test_a_signal_saves_the_run_and_ends_it_with_a_message(tmp_path: Path) -> None:
    """SIGTERM and Ctrl-C, in training (in the middle of an update), generation and evaluation."""
    plan = make_plan(tmp_path, TRANSFORMERS)
    run_reference(tmp_path, plan)
    plan["arguments"] += ["--checkpoint.every_n_updates", "0"]
    stops = [
        (
            {"event": "before training step", "count": 4, "signal": signal.SIGTERM},
            "Stopped by SIGTERM",
            "update-00000002",
        ),
        ({"event": "after training step", "count": 3, "signal": signal.SIGINT}, "Stopped by SIGINT", "update-00000002"),
        (
            {"event": "responses to a prompt", "count": 12, "signal": signal.SIGTERM},
            "Stopped by SIGTERM",
            "Nothing was",
        ),
        (
            {"event": "before write responses of heldout", "count": 2, "signal": signal.SIGTERM},
            "SIGTERM",
            "update-00000006",
        ),
    ]
    runs = [{"dir": str(tmp_path / f"run{i}"), "kill": stop | {"delay": 0.0}} for i, (stop, *_) in enumerate(stops)]
    statuses = run_driver(tmp_path, plan, [run for r in runs for run in (r, {"dir": r["dir"]})])
    expected = read_result(tmp_path / "reference")
    for i, (stop, *texts) in enumerate(stops):
        log = (tmp_path / f"run{i}.log").read_text()
        assert statuses[2 * i : 2 * i + 2] == [128 + stop["signal"], 0], log[-2000:]
        assert "Run the same command again to resume." in log
        assert all(text in log for text in texts), log[-2000:]
        assert "Traceback" not in log
        assert_same_result(tmp_path / f"run{i}", expected, str(stop))


@pytest.mark.slow(minutes=1.3)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_killed_anywhere_and_started_again(tmp_path: Path, part: int) -> None:
    """At an event of every kind and at random moments; every run directory is killed three times."""
    plan = make_plan(tmp_path, TRANSFORMERS, prompts=8)
    trace = run_reference(tmp_path, plan)
    counts = Counter(name for _, name, _ in trace)
    points = (boundary_points(counts) + random_moments(trace, 6, seed=2))[part::2]
    hits = run_matrix(tmp_path, plan, make_chains(points, trace, 3), tmp_path / "reference")
    assert hits >= 2 * len(points) // 3  # a run may end before a random moment


@pytest.mark.slow(minutes=0.8)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_killed_at_a_rounds_end_and_started_again(tmp_path: Path, part: int) -> None:
    """With callbacks that monitor metrics, a user's callback, samples and an export of every round.

    Half of the points are tried, alternately at the first round's end and, in the resumed run, at the second's;
    `python -m tests.soak.kills --rounds_end` tries them all.
    """
    plan = make_plan(tmp_path, TRANSFORMERS, prompts=8)
    plan["arguments"] += AT_ENDS
    trace = run_reference(tmp_path, plan)
    points = round_end_points(trace)
    assert {"before evaluation", "before generation", "before reward call", "after samples"} <= {
        p["event"] for p in points
    }
    marks = [name for _, name, _ in trace if name in ("after optimizer step", "before samples")]
    updates = marks.index("before samples")
    assert marks == [*["after optimizer step"] * updates, "before samples"] * 2  # the same number in both rounds
    last_update = ("after optimizer step", updates)
    kills = [point | {"count": 1, "since": last_update} for point in points[part::4]]
    chains = [kills[i : i + 2] for i in range(0, len(kills), 2)]
    assert run_matrix(tmp_path, plan, chains, tmp_path / "reference") == len(kills)
    ends = [json.loads(line) for line in (tmp_path / "reference" / "ends.jsonl").read_text().splitlines()]
    assert [(end["round"], end["seen"]) for end in ends] == [(0, 1), (1, 2)]


@pytest.mark.exhaustive
@pytest.mark.slow(minutes=1)
def test_killed_with_loader_workers_alive_and_started_again_at_once(tmp_path: Path) -> None:
    """The workers outlive the run for some seconds, and do not hold its lock."""
    plan = make_plan(tmp_path, [*TRANSFORMERS, "--data.num_workers", "2"])
    run_reference(tmp_path, plan)
    kill = {"event": "after optimizer step", "count": 3, "delay": 0.0}
    run = str(tmp_path / "run")
    assert run_driver(tmp_path, plan, [{"dir": run, "kill": kill}, {"dir": run}]) == [-9, 0]
    assert_same_result(tmp_path / "run", read_result(tmp_path / "reference"), "workers")


@pytest.mark.slow(minutes=1.8)
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM")
@pytest.mark.timeout(900)
def test_killed_and_started_again_with_vllm(tmp_path: Path) -> None:
    """Fewer points, because the engine takes seconds to start: while it samples, or shortly after."""
    plan = make_plan(tmp_path, ["--rollout.sampler", "VLLMSampler", "--rollout.sampler.kv_cache_gib", "0.1"])
    trace = run_reference(tmp_path, plan)
    points = [
        {"event": "after weight sync", "count": 1, "delay": 0.0},
        {"event": "responses to a prompt", "count": 15, "delay": 0.0},
        {"event": "after write responses of rounds", "count": 2, "delay": 0.01},
        {"event": "before optimizer step", "count": 2, "delay": 0.0},
        {"event": "responses to a prompt", "count": 32, "delay": 0.0},
    ]
    assert run_matrix(tmp_path, plan, make_chains(points, trace, 3), tmp_path / "reference") == len(points)
