"""Reports read only the responses that they show, and no tokens."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_pl.callbacks.run_report import before_after
from rlhf_pl.callbacks.sample_table import sample_rows
from rlhf_pl.cli.rounds import make_sample_panels
from rlhf_pl.rounds.metrics import first_responses, prompt_ids
from rlhf_pl.rounds.report.shown import typical_pairs, typical_responses
from rlhf_pl.store.round_store import Round, RoundStore


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RoundStore:
    """Two evaluations of 6 prompts with 2 responses each, in shards of 2 prompts; reading tokens fails."""
    store = RoundStore(tmp_path)
    for version in range(2):
        stored = store.held_out(version)
        stored.update(settings={})
        for number in range(3):
            rows: list[dict[str, Any]] = [
                {
                    "prompt_id": f"p{prompt}",
                    "response_index": index,
                    "prompt": json.dumps([{"role": "user", "content": f"Question {prompt}"}]),
                    "response": f"v{version} {prompt} {index}",
                    "finished": True,
                    "response_tokens": [1, 2, 3],
                }
                for prompt in (2 * number, 2 * number + 1)
                for index in range(2)
            ]
            rewards = [{"prompt_id": r["prompt_id"], "response_index": r["response_index"],
                        "reward": version + r["response_index"] / 2, "failure": None} for r in rows]  # fmt: skip
            stored.write_shard("responses", number, pa.Table.from_pylist(rows))
            stored.write_shard("rewards", number, pa.Table.from_pylist(rewards))
        stored.complete("responses")
        stored.complete("rewards")
    read = Round.read_shard

    def without_tokens(stored: Round, stage: str, number: int, columns: Any = None) -> pa.Table:
        assert stage != "responses" or "response_tokens" not in (columns or ["response_tokens"])
        return read(stored, stage, number, columns)

    monkeypatch.setattr(Round, "read_shard", without_tokens)
    return store


def test_first_responses_are_those_to_the_wanted_prompts(store: RoundStore) -> None:
    stored = store.held_out(1)
    assert prompt_ids(stored) == [f"p{i}" for i in range(6)]
    found = first_responses(stored, ["p4", "p1"])
    assert {name: (row["response"], row["reward"], row["question"]) for name, row in found.items()} == {
        "p1": ("v1 1 0", 1.0, "Question 1"),
        "p4": ("v1 4 0", 1.0, "Question 4"),
    }


def test_the_sample_table_has_a_column_for_each_version(store: RoundStore) -> None:
    header, rows = sample_rows(store, 1, 3)
    assert header == ["prompt", "before", "after round 1"]
    assert rows == [[f"Question {i}", f"v0 {i} 0\n[reward 0.000]", f"v1 {i} 0\n[reward 1.000]"] for i in range(3)]


def remove_rewards(stored: Round, missing: set[tuple[str, int]]) -> None:
    """Take the rewards of some responses away, as where scoring has failed."""
    tables = {number: pq.read_table(file) for number, file in stored.shards("rewards").items()}
    stored.clear("rewards")
    for number, table in tables.items():
        is_missing = [(r["prompt_id"], r["response_index"]) in missing for r in table.to_pylist()]
        rows = [r | ({"reward": None} if gone else {}) for r, gone in zip(table.to_pylist(), is_missing, strict=True)]
        stored.write_shard("rewards", number, pa.Table.from_pylist(rows, table.schema))
    stored.complete("rewards")


def test_responses_without_a_reward_are_shown_with_a_dash_and_stand_for_no_prompt(store: RoundStore) -> None:
    remove_rewards(store.held_out(1), {("p0", 0), ("p1", 0), ("p1", 1)})
    assert sample_rows(store, 1, 2)[1] == [
        ["Question 0", "v0 0 0\n[reward 0.000]", "v1 0 0\n[reward -]"],
        ["Question 1", "v0 1 0\n[reward 0.000]", "v1 1 0\n[reward -]"],
    ]
    shown = typical_responses(store.held_out(1), ["p0", "p1", "p2"])
    assert {name: (row["response"], row["mean"]) for name, row in shown.items()} == {
        "p0": ("v1 0 1", 1.5),
        "p2": ("v1 2 0", 1.25),
    }
    titles = [str(panel.title) for panel in before_after(store, 1, 9).renderables[1:]]
    assert titles == [f"Question {i}" for i in (0, 2, 3, 4, 5)]


def test_the_report_shows_the_first_of_prompts_with_equal_gains(store: RoundStore) -> None:
    titles = [str(panel.title) for panel in before_after(store, 1, 3).renderables[1:]]
    assert titles == ["Question 0", "Question 1", "Question 2"]


@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_a_rounds_samples_are_those_of_its_first_prompts(store: RoundStore, count: int) -> None:
    panels = make_sample_panels(store.held_out(0), count)
    assert [str(panel.title) for panel in panels] == [f"p{i}" for i in range(min(count, 6))]


def test_the_shown_pair_of_responses_has_the_gain_of_its_prompt(tmp_path: Path) -> None:
    rounds = []
    for version, rewards in enumerate(([0.0, 0.4], [0.1, 0.9])):  # a mean of 0.2, then of 0.5
        stored = RoundStore(tmp_path).held_out(version)
        stored.update(settings={})
        names = [{"prompt_id": "p", "response_index": i} for i in range(2)]
        text = {"prompt": json.dumps([{"role": "user", "content": "Hi"}]), "response": "x", "finished": True}
        stored.write_shard("responses", 0, pa.Table.from_pylist([name | text for name in names]))
        scored = [name | {"reward": reward} for name, reward in zip(names, rewards, strict=True)]
        stored.write_shard("rewards", 0, pa.Table.from_pylist(scored))
        stored.complete("responses")
        stored.complete("rewards")
        rounds.append(stored)
    before, after = typical_pairs(rounds[0], rounds[1], ["p"])
    # the gains of the four pairs are 0.1, 0.9, -0.3 and 0.5; that of the prompt is 0.3: the first of two equally near
    assert (before["p"]["reward"], after["p"]["reward"]) == (0.0, 0.1)
