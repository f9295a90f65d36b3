"""Losses of the DPO family through the real command: on rounds, on offline pairs, and in sums of losses."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_pl.__main__ import main
from rlhf_pl.store.round_store import RoundStore
from tests.algorithms.trained_round import Group, assert_same_training, logged_losses, naive_updates, token_logps
from tests.conftest import save_llama

DOCS = Path(__file__).parents[2] / "docs" / "algorithms.md"
Logps = dict[int, Tensor]


def test_the_mixture_of_the_docs_on_several_pairs_of_a_round(
    fit: Callable[..., int], llama: Path, tmp_path: Path
) -> None:
    """DPO to another model plus a tenth of the NLL, on best against the rest, divided by tokens; two updates."""
    from transformers import AutoModelForCausalLM

    found = re.search(r"```yaml\n(# mixture.yaml.*?)```", DOCS.read_text(), re.DOTALL)
    assert found is not None
    Path("mixture.yaml").write_text(found[1])
    other = save_llama(tmp_path / "other", seed=1)
    options = f"--model.reference {other} --rollout.selector BestVsRest --data.max_tokens_per_batch 150"
    assert fit("--config", "mixture.yaml", *options.split()) == 0
    reference = AutoModelForCausalLM.from_pretrained(other).eval()

    def mixture(new: Logps, old: Logps, groups: list[Group]) -> Tensor:
        prompts, tokens = [], []
        for group in groups:
            rewards = [row["reward"] for row in group]
            best = rewards.index(max(rewards))
            with torch.no_grad():
                base = [token_logps(reference, row).sum() for row in group]
            d = [new[id(row)].sum() - base[i] for i, row in enumerate(group)]
            worse = [i for i, reward in enumerate(rewards) if reward < rewards[best]]
            if worse:
                prompts.append(torch.stack([-logsigmoid(0.1 * (d[best] - d[i])) for i in worse]).mean())
                tokens.append(new[id(group[best])])
        return torch.stack(prompts).mean() - 0.1 * torch.cat(tokens).mean()

    losses, start, wanted = naive_updates(llama, 2, mixture)
    assert logged_losses() == pytest.approx(losses, rel=1e-4)
    assert_same_training(start, wanted)
    training = RoundStore("run").round(0).manifest["settings"]["training"]
    assert training["terms"] == ["1 x rlhf_pl.DPOLoss(beta=0.1, label_smoothing=0.0)", "0.1 x rlhf_pl.ChosenNLL()"]


def test_sppo_on_all_responses_of_a_round(fit: Callable[..., int], llama: Path) -> None:
    assert fit("--model.loss", "SPPOLoss", "--model.loss.beta", "0.1") == 0

    def sppo(new: Logps, old: Logps, groups: list[Group]) -> Tensor:
        terms = []
        for group in groups:
            for row in group:
                wins = [1 / (1 + torch.tensor(other["reward"] - row["reward"]).exp()) for other in group]
                win_rate = (sum(wins) - 0.5) / (len(group) - 1)
                terms.append(((new[id(row)] - old[id(row)]).sum() - (win_rate - 0.5) / 0.1) ** 2)
        return torch.stack(terms).mean()

    losses, start, wanted = naive_updates(llama, 2, sppo)
    assert logged_losses() == pytest.approx(losses, rel=1e-4)
    assert_same_training(start, wanted)


def preference(i: int) -> dict[str, Any]:
    """Every second row has two conversations with an implicit prompt."""
    prompt, chosen, rejected = f"Say {i}", f"I say {i}" + " and on" * (i % 4), "No " * (1 + i % 3)
    if i % 2:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    user = {"role": "user", "content": prompt}
    return {key: [user, {"role": "assistant", "content": text}]
            for key, text in (("chosen", chosen), ("rejected", rejected))}  # fmt: skip


@pytest.fixture
def offline(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`rlhf-pl fit` on 11 preferences without rewards, a tie, and equal responses; updates of 8 and 3 pairs."""
    monkeypatch.chdir(tmp_path)
    rows = [*map(preference, range(11)), {"prompt": "Say", "chosen": "same", "rejected": "same"}]
    rows.append({"prompt": "Say", "chosen": "one", "rejected": "two", "label": "tie"})
    rows[1] = {"prompt": rows[1]["prompt"], "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"], "label": 0}
    Path("preferences.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ("--model.policy", str(llama), "--data", "OfflineDataModule", "--data.pairs", "preferences.jsonl")
    trainer = ("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--model.optimizer.lr", "1e-3")
    trainer += ("--trainer.precision", "32-true")

    def run(folder: str, *options: str) -> int:
        return main(["fit", *given, *trainer, "--trainer.default_root_dir", folder, *options])

    return run


def test_offline_preferences_without_rewards_in_any_division(
    offline: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    loss = "--model.loss CPOLoss --model.loss.nll_weight 0.5"
    divisions = {
        "whole": "--data.batch_size 8",
        "divided": "--data.batch_size 2 --trainer.accumulate_grad_batches 4 --data.max_tokens_per_batch 90",
    }
    for folder, options in divisions.items():
        assert offline(folder, *loss.split(), *options.split()) == 0
    assert "11 for training, 0 held out; left out: 1 of equal responses, 1 of equal rewards" in capsys.readouterr().out
    wanted = load_file("whole/model/model.safetensors")
    for folder in divisions:
        for name, tensor in load_file(f"{folder}/model/model.safetensors").items():
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=2e-4)
    stored = RoundStore("whole").round(0)
    assert stored.read("logps").column_names == ["prompt_id", "response_index"]  # no other policy is needed
    texts = [row["response"] for row in stored.read("responses").to_pylist() if row["prompt_id"] == "row-1"]
    assert texts == ["I say 1 and on", "No No "]  # its label is 0
    rewards = {(row["chosen_reward"], row["rejected_reward"]) for row in stored.read("pairs").to_pylist()}
    assert rewards == {(1.0, 0.0)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "no `chosen_reward`; found chosen, rejected. Name yours with --data.columns.chosen_reward, or choose"),
        ("--model.loss DPOLoss --model.kl_coef 0.1", "`model.loss` DPOLoss reads no rewards"),
        (
            "--model.loss SumOfLosses --model.loss.losses+ DPOLoss --model.loss.losses.beta 0",
            "`model.loss.beta` must be",
        ),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(
    offline: Callable[..., int], capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    assert offline("run", *options.split()) == 1
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert error.count("error: ") == 1
    assert not Path("run").exists()


def test_a_loss_that_overflows_by_its_own_options_is_refused(
    offline: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The target is 5e29 nats, whose square is above the largest float32."""
    assert offline("run", "--model.loss", "SPPOHardLoss", "--model.loss.beta", "1e-30") == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "`model.loss` SPPOHardLoss overflows float32 before any training, in 11 of 11 pairs" in error


def test_a_selector_is_refused_where_no_pairs_are_selected(
    offline: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert offline("selector", "--model.loss", "DPOLoss", "--rollout.selector", "AllPairs") == 1
    assert "`rollout.selector` is AllPairs, but OfflineDataModule provides fixed data" in capsys.readouterr().err
    assert not Path("selector").exists()
