"""The examples of docs/architecture.md are short, and run."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.compute as pc
import pytest

from rlhf_pl.__main__ import main
from rlhf_pl.store.round_store import RoundStore

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (my_\w+\.py): .*?\n(.*?)```", PAGE, re.DOTALL))


def test_examples_are_short() -> None:
    assert len(EXAMPLES) == 4
    assert all(len(code.strip().splitlines()) < 30 for code in EXAMPLES.values())


def test_files_to_read_exist() -> None:
    named = re.findall(r"`((?:rlhf_pl|callbacks)/[\w./]*)`", PAGE)
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_examples_train_a_round(
    tmp_path: Path, llama: Path, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All four together, with the options of the page; the callback's metric is the length of the longest response."""
    for name, code in EXAMPLES.items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = [o for line in re.findall(r"```python\n# my_\w+\.py: (.*)\n", PAGE) for o in line.split()]
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": ".", "name": "logs", "version": ""}}
    fixed = {
        "--model.policy": str(llama),
        "--data.prompts": write_jsonl([{"prompt": f"What is {i} plus {i}?"} for i in range(4)]),
        "--data.max_prompt_tokens": "64",
        "--rollout.sampling.num_responses": "3",
        "--rollout.sampling.max_response_tokens": "6",
        "--trainer.max_epochs": "1",
        "--trainer.accelerator": "cpu",
        "--trainer.default_root_dir": "run",
        "--trainer.logger": json.dumps(logger),
    }
    assert main(["fit", *options, *(part for option in fixed.items() for part in option)]) == 0
    stored = RoundStore("run").round(0)
    assert stored.manifest["settings"]["training"]["loss"] == "my_losses.AllPairsRebel(eta=0.5)"
    rewards = stored.read("rewards").to_pylist()
    responses = stored.read("responses").to_pylist()
    assert [r["reward"] for r in rewards] == [1.0 if r["finished"] else 0.5 for r in responses]
    longest = pc.max(pc.list_value_length(stored.read("responses")["response_tokens"])).as_py()
    rows = list(csv.DictReader(Path("logs/metrics.csv").read_text().splitlines()))
    assert [float(row["rollout/longest_response"]) for row in rows if row.get("rollout/longest_response")] == [longest]
    assert (tmp_path / "run" / "model" / "config.json").exists()
