"""Runs with `eta: auto`: chosen from the stored round, logged, and the same after a stop inside a round."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest

from rlhf_pl import RebelLoss, SumOfLosses
from rlhf_pl.callbacks import RoundCheckpoint
from rlhf_pl.cli.rounds import show
from rlhf_pl.rollout import SamplingConfig
from rlhf_pl.store.round_store import Round, RoundStore
from tests.integration.test_fit import PROMPTS, assert_same, fit, weights
from tests.modules.test_statistics import column
from tests.stored_pairs import read_pairs


@pytest.fixture
def prompts(write_jsonl: Callable[..., str]) -> str:
    return write_jsonl(PROMPTS)


class Stop(L.Callback):
    """Ends the run as Ctrl-C does, after the second round's first update."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 4:
            raise KeyboardInterrupt


def scored_variance(stored: Round) -> float:
    """Mean over prompts of the unbiased variance of their responses' rewards."""
    table = stored.read("rewards").to_pandas()
    return float(table.groupby("prompt_id")["reward"].var().mean())


def test_eta_by_kl_is_the_same_after_a_stop_inside_a_round(
    tmp_path: Path, llama: Path, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if the KL that the second round's eta came from is not known any more."""
    runs, loss = [], RebelLoss("auto", target_kl=0.1)
    for name in ("whole", "parts"):
        folder = tmp_path / name
        settings: dict[str, Any] = {"enable_checkpointing": True, "module": {"loss": loss}}
        if name == "parts":
            with pytest.raises(SystemExit):
                fit(folder, llama, prompts, [RoundCheckpoint(every_n_updates=1), Stop()], **settings)
            held_out = RoundStore(folder).held_out(1)
            held_out.update(stages={k: v for k, v in held_out.manifest["stages"].items() if k != "kl"})
            settings["ckpt_path"] = str(folder / "checkpoints" / "last.ckpt")
        _, module = fit(folder, llama, prompts, [RoundCheckpoint(every_n_updates=1)], **settings)
        runs.append((weights(module), [stored.manifest for stored in RoundStore(folder).rounds().values()]))
    (whole, first), (parts, second) = runs
    assert_same(whole, parts)
    assert [m["chosen"] for m in first] == [m["chosen"] for m in second]
    assert [m["stages"]["training"]["margins"] for m in first] == [m["stages"]["training"]["margins"] for m in second]

    store, factor = RoundStore(tmp_path / "whole"), 1.0
    for index, manifest in enumerate(first):
        (choice,) = manifest["chosen"]["terms"]
        if index:
            reached = store.held_out(index).info("kl")
            is_sure = abs(reached["new_old"] - 0.1) > reached["new_old_se"]
            factor = float(np.clip((0.1 / reached["new_old"]) ** 0.5, 0.5, 2)) if is_sure else 1.0
        expected = factor * (2 * 0.1 / scored_variance(store.round(index))) ** 0.5
        assert choice["eta"] == pytest.approx(expected, rel=1e-6)
        assert choice["correction"] == pytest.approx(factor)
        updates = column(tmp_path / "whole", "train/eta")[3 * index : 3 * index + 3]
        assert updates == pytest.approx([expected] * 3, rel=1e-5)
    capsys.readouterr()
    show(tmp_path / "whole", None, 0, False)
    assert f"round 2: eta {choice['eta']:.3g} (auto), " in capsys.readouterr().out
    show(tmp_path / "whole", 2, 0, False)
    assert "chosen by the loss: eta " in capsys.readouterr().out


def test_eta_by_spread_counts_the_kl_penalty_and_is_chosen_anew_in_each_run(
    tmp_path: Path, llama: Path, prompts: str
) -> None:
    """One loss for two runs, alone and in a sum; in the second round the penalty is part of the margins."""
    loss = RebelLoss("auto", target_spread=0.7)
    losses = {0.2: loss, 0.0: SumOfLosses([loss, RebelLoss("auto", target_kl=0.1)], [1.0, 0.5])}
    refresh = {"sampling": SamplingConfig(num_responses=3, max_response_tokens=8)}
    for kl_coef in (0.2, 0.0):
        folder = tmp_path / str(kl_coef)
        fit(folder, llama, prompts, module={"loss": losses[kl_coef], "kl_coef": kl_coef}, refresh=refresh)
        for stored in RoundStore(folder).rounds().values():
            pairs = read_pairs(stored)
            margins = [row["chosen_reward"] - row["rejected_reward"] for row in pairs]
            if kl_coef:
                terms = [[row[f"{w}_old_logp"] - row[f"{w}_reference_logp"] for row in pairs]
                         for w in ("chosen", "rejected")]  # fmt: skip
                margins = list(np.array(margins) - kl_coef * (np.array(terms[0]) - np.array(terms[1])))
            choice = stored.manifest["chosen"]["terms"][0]
            assert choice["eta"] == pytest.approx(0.7 / np.sqrt(np.mean(np.square(margins))), rel=1e-5)
            settings = stored.manifest["settings"]["training"]
            described = "rlhf_pl.RebelLoss(eta='auto', target_spread=0.7)"
            assert described in (settings["loss"], settings.get("terms", [""])[0].removeprefix("1 x "))
        choices = [stored.manifest["chosen"] for stored in RoundStore(folder).rounds().values()]
        assert json.loads(json.dumps(choices)) == choices
    assert len({round(value, 9) for value in column(folder, "train/eta")}) == 2
    for number, choice in enumerate(choices):
        assert choice["numbers"] == {"eta": choice["terms"][0]["eta"], "eta_2": choice["terms"][1]["eta"]}
        assert column(folder, "train/eta_2")[3 * number] == pytest.approx(choice["terms"][1]["eta"])
