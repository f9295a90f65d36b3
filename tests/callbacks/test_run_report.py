"""The printed report of a run agrees with its store."""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_pl import ReinforceLoss, SamplingConfig
from rlhf_pl.callbacks import RunReport
from rlhf_pl.rounds.report.numbers import decimals_for
from tests.callbacks.conftest import SmallRun
from tests.conftest import make_tokenizer
from tests.integration.test_fit import PROMPTS, fit

Again = Callable[..., Any]


def by_prompt(rows: list[dict[str, Any]]) -> list[list[float]]:
    """Rewards of each prompt's responses."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["prompt_id"], []).append(row["reward"])
    return list(found.values())


def mean_reward(rows: list[dict[str, Any]]) -> float:
    return statistics.mean(row["reward"] for row in rows)


def kl_of(run: SmallRun, version: int) -> dict[str, float]:
    return run.store.held_out(version).info("kl")


@pytest.mark.parametrize("index", [0, 1])
def test_a_rounds_line_has_its_numbers(run: SmallRun, index: int) -> None:
    rows, after = run.rows("rounds", index), mean_reward(run.rows("heldout", index + 1))
    groups, kl = by_prompt(rows), kl_of(run, index + 1)
    start, before = (mean_reward(run.rows("heldout", version)) for version in (0, index))
    digits = decimals_for(min((abs(mean - start) for mean in (before, after) if mean != start), default=0.0))
    at_start = f" ({start:.{digits}f} at the start)" if index else ""
    (line,) = [text for text in run.printed.splitlines() if text.startswith(f"round {index + 1}: ")]
    parts = line.removeprefix(f"round {index + 1}: ").split(" | ")
    best, worst = (statistics.mean(map(choose, groups)) for choose in (max, min))
    tokens = statistics.mean(len(row["response_tokens"]) for row in rows)
    finished = statistics.mean(row["finished"] for row in rows)
    training = run.store.round(index).info("training")
    assert parts[:4] == [
        f"reward {mean_reward(rows):.3f} (best {best:.3f}, worst {worst:.3f} of 4)",
        f"held-out reward {before:.{digits}f} → {after:.{digits}f}{at_start}, "
        f"KL(new||old) {kl['new_old']:z.2f} ± {kl['new_old_se']:.2f} (k1)",
        f"{tokens:.0f} tokens, {finished:.0%} finished",
        f"KL(old||new) {training['kl']:z.2f} (k1), loss {training['loss']:.3f}",
    ]
    margins = training["margins"]
    assert parts[4] == f"{margins['reached']:z.0%} of the targets reached, R² {margins['r2']:.2f}"
    assert parts[5].startswith("seconds: generate ")


def test_the_final_table_has_a_line_for_each_round(run: SmallRun) -> None:
    lines = run.printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("round  reward"))
    assert lines[start].split() == [
        *("round", "reward", "best", "worst", "tokens", "finished", "pairs", "old||new", "loss", "time"),
        *("reached", "before", "after", "new||old"),
    ]
    for index in range(2):
        rows, training = run.rows("rounds", index), run.store.round(index).info("training")
        groups = by_prompt(rows)
        before, after = (mean_reward(run.rows("heldout", version)) for version in (index, index + 1))
        cells = lines[start + 2 + index].split()
        assert cells[-5:-2] == ["s", f"{training['margins']['reached']:.0%}", f"{before:.3f}"]
        assert cells[:9] + cells[-2:] == [
            str(index + 1),
            f"{mean_reward(rows):.3f}",
            *(f"{statistics.mean(map(choose, groups)):.3f}" for choose in (max, min)),
            f"{statistics.mean(len(row['response_tokens']) for row in rows):.0f}",
            f"{statistics.mean(row['finished'] for row in rows):.0%}",
            str(sum(max(rewards) > min(rewards) for rewards in groups)),
            f"{training['kl']:.2f}",
            f"{training['loss']:.3f}",
            f"{after:.3f}",
            f"{kl_of(run, index + 1)['new_old']:.2f}",
        ]


def test_four_held_out_prompts_prove_nothing(run: SmallRun) -> None:
    before, after = (mean_reward(run.rows("heldout", version)) for version in (0, 2))
    (line,) = [text for text in run.printed.splitlines() if text.startswith("Held-out reward ")]
    assert line.startswith(f"Held-out reward {before:.3f} before, {after:.3f} after")
    assert "on 4 held-out prompts: too few to tell" in line
    assert "`data.val_prompts` (now 4)" in line
    assert "standard errors" not in line


def test_prompts_of_median_gain_are_shown_with_typical_responses(run: SmallRun) -> None:
    groups = [by_prompt(run.rows("heldout", version)) for version in (0, 2)]
    gains = [statistics.mean(new) - statistics.mean(old) for old, new in zip(*groups, strict=True)]
    middle = statistics.median(gains)
    pairs = [[b - a for a in old for b in new] for old, new in zip(*groups, strict=True)]
    apart = [min(abs(pair - gain) for pair in found) for found, gain in zip(pairs, gains, strict=True)]
    expected = sorted(range(4), key=lambda i: round(abs(gains[i] - middle) + apart[i], 9))[:2]
    asked = [row for row in run.rows("heldout", 0) if row["response_index"] == 0]
    for position, row in enumerate(asked):
        question = json.loads(row["prompt"])[-1]["content"]
        assert (f"─ {question} ─" in run.printed) == (position in expected)
    assert "Held-out prompts of median gain" in run.printed


def test_the_report_starts_with_the_run_directory_and_ends_with_next_steps(run: SmallRun) -> None:
    lines = run.printed.splitlines()
    assert f"Prompts: 10 for training, 10 a round; 4 held out. Run directory: {run.folder}" in lines
    assert lines[-1].startswith(f"Kept in {run.folder}: ")
    assert lines[lines.index("Next:") : -1] == [
        "Next:",
        *[text for text in lines if text.startswith("  see the curves:  Log")],
        f"  read responses:  {run.folder}/samples.html, and {run.folder}/rounds/*/ (Parquet)",
        f"  use the model:   {run.folder}/model, with transformers or `vllm serve {run.folder}/model`",
    ]  # from Python there is no config.yaml, and this run has no logger of Lightning's
    assert "How to read the rounds:" in lines


def test_prompts_that_are_too_long_or_repeated_are_counted(
    again: Again, write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    repeated = [*PROMPTS, PROMPTS[3] | {"prompt_id": "p3 again"}, {"prompt_id": "long", "prompt": "why? " * 70}]
    tokenizer = make_tokenizer()
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in repeated]
    assert sorted(lengths)[-2] < 50 < lengths[-1]
    options: dict[str, Any] = {"prompts": write_jsonl(repeated), "data": {"val_prompts": 0}}
    again(RunReport(), held_out=False, **options)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Prompts: 15 for training, 15 a round; 0 held out; 1 left out, longer than 64 tokens. Run" in printed
    assert "warning: Prompts that ask the same as another: 1; they are kept." in printed


def test_without_held_out_prompts_there_is_no_before_and_after(
    again: Again, capsys: pytest.CaptureFixture[str]
) -> None:
    again(RunReport(), held_out=False)
    printed = capsys.readouterr().out
    assert "round 1: reward" in printed
    assert not any(word in printed.lower() for word in ("held-out", "before", "new||old"))


def test_an_unfinished_round_is_not_reported(again: Again, capsys: pytest.CaptureFixture[str]) -> None:
    again(RunReport(), max_steps=1)
    printed = capsys.readouterr().out
    assert "Prompts: 10 for training" in printed
    assert not any(text in printed for text in ("round 1:", "Rounds", "Next:"))
    assert "Stopped inside round 1 at update 1" in printed


def test_one_response_a_prompt_has_no_best_and_worst(
    tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor pairs, nor, for a loss without pi_old, a KL to it."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    one = {"sampling": SamplingConfig(num_responses=1, max_response_tokens=8), "val_num_responses": 1}
    fit(tmp_path, llama, str(prompts), [RunReport()], {"loss": ReinforceLoss("none")}, refresh=one, max_epochs=1)
    printed = capsys.readouterr().out
    (line,) = [text for text in printed.splitlines() if text.startswith("round 1: ")]
    assert "best" not in printed
    assert "worst" not in printed
    assert re.search(r" \| loss -?\d", line)
    (header,) = [text.split() for text in printed.splitlines() if text.startswith("round  reward")]
    assert header[:5] == ["round", "reward", "tokens", "finished", "prompts"]
