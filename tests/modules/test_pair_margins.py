"""The metrics of pairs, and the eta that a run has chosen, equal those of an independent computation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_pl.store.round_store import Round, RoundStore
from tests.conftest import save_llama
from tests.integration.test_kill_matrix import outcomes
from tests.stored_pairs import read_pairs

DIVISIONS = {  # of an update of all 41 pairs into micro-batches: (ranks, options)
    "tokens": (1, "--data.batch_size 1 --trainer.accumulate_grad_batches 64 --data.max_tokens_per_batch 160"),
    "ranks": (2, "--data.batch_size 4 --trainer.accumulate_grad_batches 8 --trainer.devices 2 --trainer.strategy ddp"),
}


def logged(run: Path, step: int) -> dict[str, float]:
    """All metrics of an update."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("train/")]
    found = {name: [event.value for event in events.Scalars(name) if event.step == step] for name in names}
    return {name: values[0] for name, values in found.items() if values}


def plain_margins(stored: Round, model: Path, checkpoint: Path) -> np.ndarray:
    """Log-ratio margins of a round's pairs under a checkpoint's weights, by eager transformers, row by row."""
    from transformers import AutoModelForCausalLM

    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    lm.load_state_dict({name.removeprefix("policy.lm."): tensor for name, tensor in state.items()}, strict=False)

    def logp(prompt: list[int], response: list[int]) -> float:
        with torch.no_grad():
            logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1)[range(len(response)), response].double().sum())

    ratios: list[list[float]] = [
        [logp(row["prompt_tokens"], row[f"{w}_tokens"]) - row[f"{w}_old_logp"] for w in ("chosen", "rejected")]
        for row in read_pairs(stored)
    ]
    return np.array(ratios) @ [1.0, -1.0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two passes over 41 pairs for each division, an update each: the second one logs the policy of the first."""
    folder = tmp_path_factory.mktemp("margins")
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}" + " and on" * (i % 5), "rejected": "no " * (1 + i % 4),
         "chosen_reward": 1.0 + (i % 7) ** 2 / 10, "rejected_reward": 0.5} for i in range(41)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = f"--model.policy {save_llama(folder / 'llama')} --model.optimizer.lr 1e-3 --model.loss.eta auto "
    shared += f"--model.loss.target_spread 1.5 --data OfflineDataModule --data.pairs {folder}/rows.jsonl "
    shared += "--checkpoint.keep_rounds -1 --trainer.max_epochs 2 --trainer.accelerator cpu "
    shared += "--trainer.log_every_n_steps 1"
    plans: list[dict[str, Any]] = [
        {"dir": str(folder / name), "ranks": ranks, "arguments": [*shared.split(), *options.split()]}
        for name, (ranks, options) in DIVISIONS.items()
    ]
    for run, outcome in zip(plans, outcomes(folder, {"arguments": ["fit"]}, plans), strict=True):
        assert set(outcome["every"]) == {0}, Path(f"{run['dir']}.log").read_text()[-3000:]
    return folder


@pytest.mark.parametrize("division", DIVISIONS)
def test_metrics_of_an_update_equal_numpy(runs: Path, division: str) -> None:
    stored = RoundStore(runs / division).round(0)
    pairs = stored.read("pairs")
    rewards = (pairs["chosen_reward"].to_numpy() - pairs["rejected_reward"].to_numpy()).astype(np.float64)
    margins = plain_margins(stored, runs / "llama", runs / division / "checkpoints" / "after-round-0001.ckpt")
    eta = 1.5 / np.sqrt((rewards**2).mean())
    slope = (rewards @ margins) / (rewards @ rewards)
    gradients = np.sort(np.abs(margins - eta * rewards))  # half of REBEL's
    expected = {
        "train/eta": eta,
        "train/slope": slope,
        "train/r2": 1 - ((margins - slope * rewards) ** 2).sum() / (margins @ margins),
        "train/reached_p50": np.quantile(np.abs(margins), 0.5),
        "train/reached_p95": np.quantile(np.abs(margins), 0.95),
        "train/target_p50": np.quantile(eta * np.abs(rewards), 0.5),
        "train/target_p95": np.quantile(eta * np.abs(rewards), 0.95),
        "train/gradient_top5": gradients[-2:].sum() / gradients.sum(),
        "train/loss": ((margins - eta * rewards) ** 2).mean(),
    }
    found = logged(runs / division, 1)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-3, abs=1e-4)
    assert abs(slope) > 0.01
    (choice,) = stored.manifest["chosen"]["terms"]
    assert choice == pytest.approx({"eta": eta, "target_spread": 1.5, "margin_rms": 1.5 / eta}, rel=1e-6)
    first = logged(runs / division, 0)
    assert first["train/slope"] == 0.0  # the policy is still pi_old
    assert "train/r2" not in first


def test_histograms_are_logged_once_a_round(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs / "ranks" / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    for name in ("train/reached_histogram", "train/target_histogram"):
        found = events.Histograms(name)
        assert [event.step for event in found] == [0, 1]
        assert {event.histogram_value.num for event in found} == {41}
