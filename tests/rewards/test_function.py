from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_pl.errors import InputError
from rlhf_pl.rewards import FunctionReward, RewardResult, Sample
from rlhf_pl.rewards.function import import_function
from rlhf_pl.rewards.guard import ScoringConfig, guarded_scores, try_reward


def sample(response: str = "four", **columns: Any) -> Sample:
    return Sample("id-1", [{"role": "user", "content": "2 + 2?"}], response, (5, 6), True, columns)


def scores(function: Callable[..., Any], *samples: Sample) -> list[float]:
    return [r.reward for r in guarded_scores(FunctionReward(function), samples, ScoringConfig(retries=0))]


def test_function_gets_the_arguments_it_names() -> None:
    def reward(prompt: str, response: str, finished: bool, answer: str, missing: int = 3) -> float:
        assert (prompt, finished, missing) == ("2 + 2?", True, 3)
        return float(response == answer)

    assert scores(reward, sample("four", answer="four"), sample("five", answer="four")) == [1.0, 0.0]


def test_function_can_take_everything() -> None:
    def reward(response: str, **others: Any) -> int:
        assert {"prompt", "messages", "response_tokens", "prompt_id", "answer"} <= set(others)
        return len(response)

    assert scores(reward, sample("abc", answer=1)) == [3.0]


def test_function_gets_tool_calls_and_tools() -> None:
    """A call alone has no text."""
    said = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}

    def reward(response: str, response_message: dict[str, Any], tools: Any) -> float:
        return float((response, response_message, tools) == ("", said, [{"name": "add"}]))

    assert scores(reward, replace(sample(""), message=said, tools=[{"name": "add"}])) == [1.0]

    def reward_of_text(response_message: dict[str, Any], response: str, tools: Any) -> float:
        return float((response_message, tools) == ({"role": "assistant", "content": response}, "a column"))

    assert scores(reward_of_text, sample("four", tools="a column")) == [1.0]


def test_batched_function_gets_lists() -> None:
    def reward(prompts: list[str], responses: list[str], answer: list[str]) -> list[bool]:
        assert prompts == ["2 + 2?"] * 2
        return [r == a for r, a in zip(responses, answer, strict=True)]

    assert scores(reward, sample("four", answer="four"), sample("five", answer="four")) == [1.0, 0.0]


def test_components_are_kept() -> None:
    def reward(response: str) -> RewardResult:
        return RewardResult(1.0, {"length": len(response)})

    assert FunctionReward(reward).score([sample()])[0].components == {"length": 4}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda response: float("nan"), "returned nan"),
        (lambda response: float("inf"), "returned inf"),
        (lambda response: None, "returned None"),
        (lambda response: "good", "returned 'good'"),
        (lambda responses: [1.0], "returned 1 scores for 2 answers"),
        (lambda responses: [1.0] * 3, "returned 3 scores for 2 answers"),
        (lambda responses: 1.0, "must return a list of 1 numbers"),
    ],
)
def test_wrong_scores_are_refused(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(InputError, match="Reward") as error:
        scores(function, sample(), sample())
    assert message in str(error.value)
    assert "prompt_id 'id-1'" in str(error.value)
    assert "policy for failures is `error`" in str(error.value)
    with pytest.raises(InputError, match="trial call"):
        try_reward(FunctionReward(function), [sample(), sample()], ScoringConfig())


def test_check_names_unknown_arguments_and_failures() -> None:
    with pytest.raises(InputError, match=r"asks for \['solution'\].*Columns: \['answer'\]"):
        FunctionReward(lambda response, solution: 1.0).check([sample(answer=1)])
    with pytest.raises(InputError, match="ZeroDivisionError"):
        try_reward(FunctionReward(lambda response: 1 / len(response)), [sample("")], ScoringConfig())


def test_function_without_a_response_is_refused() -> None:
    with pytest.raises(InputError, match="must take `response`"):
        FunctionReward(lambda text: 1.0)


def test_import_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_reward.py").write_text("def score(response):\n    return 1.0\nLIMIT = 3\n")
    (tmp_path / "broken_reward.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert import_function("my_own_reward.score")(response="") == 1.0
    assert import_function("my_own_reward.py:score")(response="") == 1.0
    for path, message in {
        "score": "is no import path",
        "nothing_here.score": "no module 'nothing_here'",
        "my_own_reward.grade": "has no 'grade'. Its functions: score",
        "my_own_reward.LIMIT": "is int, not a function",
        "broken_reward.score": "not_installed_anywhere",
        "missing.py:score": "no file 'missing.py'",
    }.items():
        with pytest.raises(InputError) as error:
            import_function(path)
        assert message in str(error.value)


def test_fingerprint_changes_with_the_source(tmp_path: Path) -> None:
    prints = set()
    for body in ("return 1.0", "return 2.0"):
        file = tmp_path / f"r{len(prints)}.py"
        file.write_text(f"def score(response):\n    {body}\n")
        prints.add(FunctionReward(f"{file}:score").fingerprint().split(":")[-1])
    assert len(prints) == 2
