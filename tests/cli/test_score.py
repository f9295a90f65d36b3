"""`rlhf-pl score`, called as a user calls it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_pl.__main__ import main

Write = Callable[..., str]
PAIRS = [
    {"prompt": "a?", "chosen": "one two three", "rejected": "one", "id": 7},
    {"prompt": "b?", "chosen": "one", "rejected": "one two"},
    {"prompt": "c?", "chosen": "one two", "rejected": "three four", "label": "tie"},
    {"prompt": "d?", "chosen": "one two", "rejected": "one  three"},
]


def words(response: str) -> float:
    """A reward by import path."""
    return float(len(response.split()))


def run(*arguments: str) -> int:
    try:
        return main(["score", *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_pairs_give_accuracy_margin_and_calibration(
    write_jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Margins 2, -1, 0 and a tie that does not count: an accuracy of (1 + 0 + 0.5) / 3, a mean margin of 1/3."""
    output = tmp_path / "scored.jsonl"
    data = write_jsonl(PAIRS)
    assert run("--reward", "tests.cli.test_score.words", "--data", data, "--output", str(output)) == 0
    text = capsys.readouterr().out
    assert "words on 3 pairs" in text
    assert "0.5000 (95%: " in text
    assert "0.3333" in text
    assert "1 pairs with equal scores count as half correct." in text
    assert "1 ties are scored, but not counted." in text
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["chosen_reward"], r["rejected_reward"]) for r in rows] == [(3, 1), (1, 2), (2, 2), (2, 2)]
    assert rows[0]["id"] == 7


def test_conversations_with_a_combined_reward_from_yaml(
    write_jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(
        [{"prompt": "2+2?", "response": "It is 4", "answer": 4}, {"prompt": "?", "response": "no", "answer": 1}]
    )
    config = tmp_path / "score.yaml"
    config.write_text(
        """
reward:
  class_path: CombinedReward
  init_args:
    rewards:
      - reward: {class_path: NumericAnswer}
        weight: 2.0
        name: right
      - reward: tests.cli.test_score.words
        weight: -0.5
"""
    )
    output = tmp_path / "out.jsonl"
    assert run("--config", str(config), "--data", data, "--output", str(output)) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["reward"] for r in rows] == [2 - 1.5, -0.5]
    assert rows[0]["components"] == {"right": 1, "words": 3}
    assert "right" in capsys.readouterr().out


def test_a_reward_model_by_name(reward_model: Path, write_jsonl: Write, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl(PAIRS)
    assert run("--reward", "ClassifierReward", "--reward.model", str(reward_model), "--data", data) == 0
    assert "calibration error" in capsys.readouterr().out
    for model, message in (
        (["ClassifierReward", "--reward.model", str(reward_model)], "sets 'enable_thinking', which the chat template"),
        (["tests.cli.test_score.words"], "words has no chat template"),
    ):
        arguments = ["--reward", *model, "--data", data, "--chat_template_kwargs.enable_thinking", "false"]
        assert run(*arguments) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "no.such.module", "--data", "{data}"], "there is no module 'no'"),
        (["--reward", "tests.cli.test_score.words", "--data", "none.jsonl"], "no file 'none.jsonl'"),
        (["--reward", "tests.cli.test_score.words"], "data"),
        (["--reward", "ClassifierReward", "--reward.model", "/none", "--data", "{data}"], "no folder '/none'"),
        (["--reward", "HTTPReward", "--reward.url", "http://127.0.0.1:9", "--reward.retries", "0", "--data", "{data}"],
         "can't be reached"),
        (["--reward", "math.inf", "--data", "{data}"], "is float, not a function"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_one_message(
    write_jsonl: Write, capsys: pytest.CaptureFixture[str], arguments: list[Any], message: str
) -> None:
    data = write_jsonl(PAIRS)
    code = run(*(a.replace("{data}", data) for a in arguments))
    captured = capsys.readouterr()
    assert code != 0
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.count("error:") == 1


def test_calibration_of_a_coin() -> None:
    """A scorer with a confidence of 73% that is right half of the time has an error of 23%."""
    from rlhf_pl.algorithms.agreement import pair_metrics

    metrics = pair_metrics([1.0, -1.0] * 50, [0.5] * 100)
    assert metrics.calibration_error == pytest.approx(1 / (1 + math.exp(-1)) - 0.5, abs=1e-4)


REWARDS = """
import os, sys
calls = []
def exits(response):
    calls.append(response)
    if len(calls) == 8:
        sys.exit(0)
    return 1.0
def changes_folder(response):
    os.chdir("/")
    return float(len(response))
def returns_dict(responses):
    return {i: 1.0 for i in range(len(responses))}
"""


@pytest.mark.parametrize("reward", ["exits", "returns_dict"])
def test_a_reward_cannot_end_the_command_without_an_error(
    reward: str, write_jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "user_rewards.py").write_text(REWARDS)
    output = tmp_path / "out.jsonl"
    assert (
        run("--reward", f"{tmp_path}/user_rewards.py:{reward}", "--data", write_jsonl(PAIRS), "--output", str(output))
        == 1
    )
    assert f"user_rewards.py:{reward}` failed for prompt_id" in capsys.readouterr().err
    assert not output.exists()


def test_the_output_is_in_the_given_folder_if_a_reward_changes_the_working_directory(
    write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "user_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    assert run("--reward", "user_rewards.py:changes_folder", "--data", write_jsonl(PAIRS), "--output", "out.jsonl") == 0
    assert (tmp_path / "out.jsonl").exists()


def test_an_exit_with_code_0_before_the_end_is_an_error(
    write_jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a constructor. `--help` still exits with 0."""
    (tmp_path / "leaving_reward.py").write_text(
        "import sys\nfrom rlhf_pl import Reward\nclass Leaving(Reward):\n"
        "    def __init__(self):\n        sys.exit(0)\n    def score(self, batch):\n        return []\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run("--reward", "leaving_reward.Leaving", "--data", write_jsonl(PAIRS)) == 1
    assert "error: sys.exit(0) was called in" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["score", "--help"])
    assert not stop.value.code
