from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_pl.rewards import FunctionReward, RewardResult, Sample
from rlhf_pl.rewards.function import import_function
from rlhf_pl.rewards.guard import ScoringConfig, score_samples, try_reward
from rlhf_pl.utils.errors import InputError


def sample(response: str = "four", **columns: Any) -> Sample:
    return Sample("id-1", [{"role": "user", "content": "2 + 2?"}], response, (5, 6), True, columns)


def scores(function: Callable[..., Any], *samples: Sample) -> list[float]:
    return [r.reward for r in score_samples(FunctionReward(function), samples, ScoringConfig(retries=0))]


def test_function_receives_the_arguments_it_names() -> None:
    def reward(prompt: str, response: str, finished: bool, answer: str, missing: int = 3) -> float:
        assert (prompt, finished, missing) == ("2 + 2?", True, 3)
        return float(response == answer)

    assert scores(reward, sample("four", answer="four"), sample("five", answer="four")) == [1.0, 0.0]


def test_function_can_receive_all_arguments() -> None:
    def reward(response: str, **others: Any) -> int:
        assert {"prompt", "messages", "response_tokens", "prompt_id", "answer"} <= set(others)
        return len(response)

    assert scores(reward, sample("abc", answer=1)) == [3.0]


def test_function_receives_tool_calls_and_tools() -> None:
    """A response that is only a tool call has no text."""
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}

    def reward(response: str, response_message: dict[str, Any], tools: Any) -> float:
        return float((response, response_message, tools) == ("", message, [{"name": "add"}]))

    assert scores(reward, replace(sample(""), message=message, tools=[{"name": "add"}])) == [1.0]

    def reward_of_text(response_message: dict[str, Any], response: str, tools: Any) -> float:
        return float((response_message, tools) == ({"role": "assistant", "content": response}, "a column"))

    assert scores(reward_of_text, sample("four", tools="a column")) == [1.0]


def test_batched_function_receives_lists() -> None:
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
        (lambda responses: [1.0], "returned 1 scores for 2 responses"),
        (lambda responses: [1.0] * 3, "returned 3 scores for 2 responses"),
        (lambda responses: 1.0, "must return a list of 2 numbers"),
    ],
)
def test_invalid_scores_are_errors(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(InputError, match="Reward") as error:
        scores(function, sample(), sample())
    assert message in str(error.value)
    assert "prompt_id 'id-1'" in str(error.value)
    assert "policy for failures is `error`" in str(error.value)
    with pytest.raises(InputError, match="trial call"):
        try_reward(FunctionReward(function), [sample(), sample()], ScoringConfig())


def test_check_names_unknown_arguments_and_failures() -> None:
    with pytest.raises(InputError, match=r"has the parameters \['solution'\].*columns of the data: \['answer'\]"):
        FunctionReward(lambda response, solution: 1.0).check([sample(answer=1)])
    with pytest.raises(InputError, match="ZeroDivisionError"):
        try_reward(FunctionReward(lambda response: 1 / len(response)), [sample("")], ScoringConfig())


def test_function_without_a_response_is_an_error() -> None:
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
        "score": "is not an import path",
        "ClasifierReward": "or did you mean ClassifierReward?",
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
    fingerprints = set()
    for body in ("return 1.0", "return 2.0"):
        file = tmp_path / f"r{len(fingerprints)}.py"
        file.write_text(f"def score(response):\n    {body}\n")
        fingerprints.add(FunctionReward(f"{file}:score").fingerprint().split(":")[-1])
    assert len(fingerprints) == 2


WITH_HELPER = """from __future__ import annotations
import multiprocessing, os, sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
import the_helper

@dataclass
class Box:
    value: int
    other: Box | None = None

def scaled(box: Box) -> Box:
    return Box(box.value * the_helper.FACTOR, box)

def scores(responses: list[str]) -> list[int]:
    found = []
    for method in ("fork", "spawn", "forkserver"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
            found.append([box.value for box in pool.map(scaled, [Box(len(r)) for r in responses])])
    assert found[0] == found[1] == found[2], found
    return found[0]

def place(response: str) -> float:
    return float(os.path.isabs(__file__) and os.path.isfile(__file__))

if __name__ == "__main__":
    sys.exit("as a script")
"""


def test_files_work_like_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Postponed annotations, a module beside the file, and process pools.

    Two files in different folders have the same name, and so have their helpers. A third file has the name of a module
    in the standard library.
    """
    monkeypatch.chdir(tmp_path)
    files = {"a/reward.py": 2, "b/reward.py": 3, "b/random.py": 3}
    for file, factor in files.items():
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(WITH_HELPER)
        Path(file).with_name("the_helper.py").write_text(f"FACTOR = {factor}\n")
    rewards = {file: FunctionReward(f"{file}:scores") for file in files}
    for file, factor in files.items():
        assert [r.reward for r in rewards[file].score([sample("ab"), sample("c")])] == [2.0 * factor, 1.0 * factor]
    assert import_function("a/reward.py:place")("") == 1.0
    import random

    assert random.random() < 1


def test_a_file_with_the_name_of_an_installed_module_can_import_it(tmp_path: Path) -> None:
    file = tmp_path / "yaml.py"
    file.write_text("import yaml\ndef score(response):\n    return float(yaml.safe_load(response))\n")
    assert import_function(f"{file}:score")("1.5") == 1.5


def test_a_file_runs_once_until_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "counted.py"
    file.write_text("def one(response): return 1.0\ndef two(response): return 2.0\n")
    one, two = (import_function(f"{file}:{name}") for name in ("one", "two"))
    assert one.__globals__ is two.__globals__
    file.write_text("def one(response): return 5.0\ndef two(response): return 2.0\n")
    assert import_function(f"{file}:one")("") == 5.0


def test_files_that_import_while_they_score_import_from_their_folder(tmp_path: Path) -> None:
    rewards = []
    for factor in (2, 3):
        folder = tmp_path / str(factor)
        folder.mkdir()
        (folder / "late_helper.py").write_text(f"FACTOR = {factor}\nCALLS = []\n")
        (folder / "late.py").write_text(
            "def score(response):\n"
            "    import late_helper\n"
            "    late_helper.CALLS.append(response)\n"
            "    return late_helper.FACTOR * 10 + len(late_helper.CALLS)\n"
        )
        rewards.append(FunctionReward(f"{folder}/late.py:score"))
    found = [reward.score([sample("a")])[0].reward for reward in rewards * 2]
    assert found == [21.0, 31.0, 22.0, 32.0]  # each keeps its own helper


def test_relative_imports_fail_like_in_scripts(tmp_path: Path) -> None:
    (tmp_path / "sub.py").write_text("def score(response): return 1.0\n")
    file = tmp_path / "relative.py"
    file.write_text("from .sub import score\n")
    with pytest.raises(InputError, match="attempted relative import with no known parent package"):
        import_function(f"{file}:score")


@pytest.mark.parametrize("line", ["import sys; sys.exit(0)", "1 / 0", "def f(:"])
def test_a_failing_file_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(line + "\ndef score(response): return 1.0\n")
    for _ in range(2):
        with pytest.raises(InputError, match=r"running '.*broken\.py' failed: (SystemExit|ZeroDivision|SyntaxError)"):
            import_function(f"{file}:score")
