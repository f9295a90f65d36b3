"""The examples of docs/extending.md, saved under the names that the page gives them, train a small model."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_pl.__main__ import main
from rlhf_pl.store.round_store import RoundStore

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
_BLOCK = re.compile(r"```(?:python|yaml)\n# ([\w.]+)(?:: [^\n]*)?\n(.*?)```", re.DOTALL)
FILES = dict(_BLOCK.findall(PAGE))


@pytest.fixture
def page(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A folder with the files of the page, and the command: `rlhf-pl fit --config mine.yaml --config ...`."""
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    mine = {
        "model": {"policy": str(llama), "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-3}}},
        "data": {"prompts": "prompts.jsonl", "max_prompt_tokens": 64, "val_prompts": 3, "batch_size": 2},
        "rollout": {
            "reward": {"class_path": "LengthWindow"},
            "sampler": {"class_path": "TransformersSampler"},
            "sampling": {"num_responses": 3, "max_response_tokens": 6},
            "val_num_responses": 2,
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": "runs/mine", "precision": "32-true"},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(mine))
    rows = [{"prompt": f"What is {i} plus {i}?"} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def fit(names: str, *options: str) -> int:
        configs = [part for name in ["mine", *names.split()] for part in ("--config", f"{name}.yaml")]
        return main(["fit", *configs, *options])

    return fit


def logged(name: str, folder: str = "logs/mine/version_0") -> list[float]:
    """The values of a metric in the CSVLogger's file."""
    rows = csv.DictReader((Path(folder) / "metrics.csv").read_text().splitlines())
    return [float(row[name]) for row in rows if row.get(name)]


def test_every_example_is_short_and_run_here() -> None:
    assert all(len(code.strip().splitlines()) < 45 for code in FILES.values())
    source = Path(__file__).read_text()
    named = {name for names in re.findall(r'page\("([\w ]+)"', source) for name in names.split()}
    yamls = {name.removesuffix(".yaml") for name in FILES if name.endswith(".yaml")}
    assert yamls == named
    assert PAGE.count("```python") + PAGE.count("```yaml") == len(FILES)


def test_parts_of_a_round(page: Callable[..., int]) -> None:
    """A loss, a reward, a selector, a sampler, a callback, loggers, an optimizer and a schedule, in one run."""
    assert page("loss reward selector sampler callback csv optimizer") == 0
    stored = RoundStore("runs/mine").round(0)
    settings = stored.manifest["settings"]
    assert settings["training"]["loss"] == "my_losses.HuberRebel(delta=2.0, eta=5.0)"
    assert "OneByOne" in str(settings["responses"]["sampler"])
    rewards = {(r["prompt_id"], r["response_index"]): r["reward"] for r in stored.read("rewards").to_pylist()}
    lengths = []
    for row in stored.read("responses").to_pylist():
        short = min(1.0, 8 / max(1, len(row["response"])))
        assert rewards[row["prompt_id"], row["response_index"]] == short * (1.0 if row["finished"] else 0.5)
        lengths.append(len(row["response_tokens"]))
    pairs = stored.read("pairs").to_pylist()
    expected = sum(len({rewards[p, i] for i in range(3)}) - 1 for p in {p for p, _ in rewards})
    assert len(pairs) == stored.info("pairs")["pairs"] == expected
    assert logged("rollout/longest_response") == [max(lengths)]
    assert logged("train/lr")[:2] == pytest.approx([0.025, 0.05])
    assert list(Path("logs/tensorboard").rglob("events*"))


def test_a_metric_a_module_data_and_early_stopping(page: Callable[..., int], llama: Path) -> None:
    """A reward that can't gain `min_delta` ends the run after the first round and two more."""
    Path("small.py").write_text("def score(response, answer):\n    return len(set(response + answer)) / 10000\n")
    options = ["--trainer.max_epochs", "5", "--rollout.reward", "small.score", "--model.optimizer.lr", "0.1"]
    assert page("module metric data early_stopping csv", *options) == 0
    assert sorted(RoundStore("runs/mine").rounds()) == [0, 1, 2]
    before, after = (load_file(folder / "model.safetensors") for folder in (llama, Path("runs/mine/model")))
    name = "model.embed_tokens.weight"
    assert torch.equal(before[name], after[name])
    assert any(not torch.equal(before[other], after[other]) for other in before)
    shares = logged("train/chosen_longer")
    assert shares
    assert all(0 <= share <= 1 for share in shares)
    assert logged("train/trained_tensors") == [len(before) - 1.0] * len(logged("train/loss"))


def test_the_best_model_of_rows_with_other_names(page: Callable[..., int]) -> None:
    Path("questions.csv").write_text("question\n" + "\n".join(f"What is {i} plus 1?" for i in range(8)))
    assert page("columns best csv", "--trainer.max_epochs", "3", "--rollout.reward", "my_rewards.score_batch") == 0
    means = logged("val/reward_mean")[-3:]
    assert [f.name for f in Path("runs/mine/best").iterdir()] == [f"epoch={means.index(max(means))}.ckpt"]


def test_a_loss_on_groups(page: Callable[..., int]) -> None:
    assert page("reward", "--model.loss", "my_losses.AllPairsRebel", "--model.loss.eta", "0.5") == 0
    settings = RoundStore("runs/mine").round(0).manifest["settings"]
    assert settings["training"]["loss"] == "my_losses.AllPairsRebel(eta=0.5)"


def test_functions_score_a_file(page: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "four", "response": "one two two"}, {"prompt": "ten", "response": "ten"}]
    Path("responses.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, values in (("score", [2 / 3, 1.0]), ("score_batch", [-0.07, 0.0])):
        command = ["score", "--reward", f"my_rewards.{name}", "--data", "responses.jsonl", "--output", "scored.jsonl"]
        assert main(command) == 0
        scored = [json.loads(line)["reward"] for line in Path("scored.jsonl").read_text().splitlines()]
        assert scored == pytest.approx(values)


def test_monitors_of_held_out_prompts_need_them(page: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("early_stopping", "best"):
        Path("monitor.yaml").write_text(FILES[f"{name}.yaml"])
        extra = ["--trainer.callbacks+", "my_callbacks.LongestResponse"]  # of a user's class, which may log anything
        assert page("callback", "--config", "monitor.yaml", *extra, "--data.val_prompts", "0") == 1
        error = capsys.readouterr().err
        assert "monitors 'val/reward_mean'" in error
        assert "data.val_prompts" in error
        assert not Path("runs").exists()


def test_weights_and_biases(page: Callable[..., int]) -> None:
    pytest.importorskip("wandb")
    assert page("wandb") == 0
    assert list(Path("runs/mine/wandb").glob("offline-run-*"))
    assert "WandbLogger" in Path("runs/mine/loggers.json").read_text()


def test_mlflow(page: Callable[..., int]) -> None:
    pytest.importorskip("mlflow")
    assert page("mlflow") == 0
    assert Path("mlflow.db").stat().st_size > 0
    assert "MLFlowLogger" in Path("runs/mine/loggers.json").read_text()
