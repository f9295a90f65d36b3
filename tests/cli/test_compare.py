"""Two runs are compared by the held-out prompts that they share; a claim needs more than noise."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rlhf_pl.__main__ import main
from rlhf_pl.store.round_store import RoundStore


def make_run(
    folder: Path,
    after: Sequence[float],
    reward: str = "my.score",
    temperature: float = 1.0,
    prompts: Sequence[str] | None = None,
) -> str:
    """A run directory with evaluations before and after one round; two equal responses a prompt, rewards 0 before."""
    names = [f"prompt {i}" for i in range(len(after))] if prompts is None else prompts
    for version, means in ((0, [0.0] * len(after)), (1, after)):
        stored = RoundStore(folder).held_out(version)
        asked = [json.dumps([{"role": "user", "content": name}]) for name in names]
        ids = [f"row-{i}" for i in range(len(names))]
        columns: dict[str, Any] = {
            "prompt_id": [i for i in ids for _ in "ab"],
            "prompt": [q for q in asked for _ in "ab"],
        }
        stored.write_shard("responses", 0, pa.table(columns))
        stored.complete("responses", prompts=len(names), sampling={"temperature": temperature, "num_responses": 2})
        rewards = [mean for mean in means for _ in "ab"]
        stored.write_shard("rewards", 0, pa.table({"prompt_id": columns["prompt_id"], "reward": rewards}))
        stored.complete("rewards", reward=reward, mean=statistics.fmean(rewards), seconds=0.0)
        stored.update(settings={"responses": {"policy": "m"}, "rewards": {"reward": f"{reward}:1"}})
    return str(folder)


def compared(capsys: pytest.CaptureFixture[str], *arguments: str, expected: int = 0) -> str:
    assert main(["compare", *arguments]) == expected
    shown = capsys.readouterr()
    return " ".join((shown.out + shown.err).split())


def test_a_difference_beyond_noise_is_claimed_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Differences 1, 1, 1, 1, 1, 0 of six shared prompts, in another order: mean 5/6, standard error 1/6."""
    a = make_run(tmp_path / "a", [0.0] * 6)
    b = make_run(tmp_path / "b", [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0], prompts=[f"prompt {5 - i}" for i in range(7)])
    text = compared(capsys, a, b)
    assert f"{b} minus {a}, on the 6 prompts that both have: +0.833 ± 0.167, 5.0 standard errors." in text
    assert f"{b} is better on 5, worse on 0, equal on 1." in text
    assert "warning" not in text
    assert "reward on the 6 shared 0.000 0.833" in text


@pytest.mark.parametrize(
    ("after", "message"),
    [([1.0, -0.9] * 4, "+0.050 ± 0.359, within noise"), ([1.0] * 5, "+1.000. Too few prompts"),
     ([0.5] * 8, "+0.500 on each"), ([0.0] * 8, "no difference on any")],
)  # fmt: skip
def test_no_more_is_claimed_than_the_prompts_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], after: list[float], message: str
) -> None:
    a, b = make_run(tmp_path / "a", [0.0] * len(after)), make_run(tmp_path / "b", after)
    assert message in compared(capsys, a, b)


def test_runs_that_were_measured_otherwise_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "a", [0.0] * 6), make_run(tmp_path / "b", [1.0] * 6, temperature=0.5)
    assert "warning: responses were sampled with temperature 1.0 and 0.5." in compared(capsys, a, b)
    other = make_run(tmp_path / "other", [1.0] * 6, reward="other.score")
    text = compared(capsys, a, other, expected=1)
    assert "warning: the rewards are my.score and other.score" in text
    assert " minus " not in text


def test_what_can_t_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "a", [0.0] * 6), make_run(tmp_path / "b", [1.0] * 6, prompts=list("uvwxyz"))
    assert "The runs share no held-out prompt" in compared(capsys, a, b, expected=1)
    assert "holds no evaluation after 7 rounds" in compared(capsys, a, b, "--after", "7", expected=1)
    assert "There is no folder 'nowhere'" in compared(capsys, a, "nowhere", expected=1)
    assert "holds no evaluation on held-out prompts" in compared(capsys, a, str(tmp_path), expected=1)


def test_a_run_is_not_compared_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a", [0.0] * 6)
    (tmp_path / "link").symlink_to("a")
    for other in (f"{run}/", str(tmp_path / "link")):
        assert "are the same directory: name two runs." in compared(capsys, run, other, expected=1)
