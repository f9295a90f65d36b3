"""Reports read only the responses that they show, and no tokens."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rlhf_pl.callbacks.run_report import before_after
from rlhf_pl.callbacks.sample_table import sample_rows
from rlhf_pl.cli.rounds import make_sample_panels
from rlhf_pl.rounds.metrics import first_responses, prompt_ids
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


def test_the_report_shows_prompts_spread_over_the_data(store: RoundStore) -> None:
    titles = [str(panel.title) for panel in before_after(store, 1, 3).renderables]
    assert titles == ["Question 0", "Question 2", "Question 4"]


@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_a_rounds_samples_are_those_of_its_first_prompts(store: RoundStore, count: int) -> None:
    panels = make_sample_panels(store.held_out(0), count)
    assert [str(panel.title) for panel in panels] == [f"p{i}" for i in range(min(count, 6))]
