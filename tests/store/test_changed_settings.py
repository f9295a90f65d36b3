"""What a refusal says about settings that manifests store as hashes."""

from pathlib import Path
from typing import Any

import pytest

from rlhf_pl.store.provenance import ChangedSettingsError, list_differences, refuse_upstream_change
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.fingerprints import code_fingerprint, rows_fingerprint


@pytest.mark.parametrize("name", ["prompts", "columns", "messages"])
def test_changed_rows_are_named_in_words(name: str) -> None:
    before, now = rows_fingerprint(["a"]), rows_fingerprint(["b"])
    (line,) = list_differences({name: before}, {name: now})
    assert line.startswith(f"{name}: ")
    assert "have changed" in line
    assert before not in line
    assert now not in line


def test_changed_code_of_a_reward_is_named_without_its_hash() -> None:
    def first(response: str) -> float:
        return float(len(response))

    def second(response: str) -> float:
        return -float(len(response))

    before, now = ({"reward": f"mine.score:{code_fingerprint(function)}"} for function in (first, second))
    assert list_differences(before, now) == ["reward: the content of mine.score has changed (code, weights or data)"]


def test_values_that_are_not_hashes_keep_their_text() -> None:
    before: dict[str, Any] = {"sampling": {"temperature": 1.0}, "seed": 1}
    now: dict[str, Any] = {"sampling": {"temperature": 0.5}, "seed": 1234567890123456}
    assert list_differences(before, now) == ["sampling.temperature: 1.0 -> 0.5", "seed: 1 -> 1234567890123456"]


def test_the_number_of_held_out_responses_is_named_by_its_own_option(tmp_path: Path) -> None:
    store = RoundStore(tmp_path)
    for stored in (store.round(0), store.held_out(0)):
        before, now = ({"responses": {"sampling": {"num_responses": number}}} for number in (2, 8))
        stored.update(settings=before)
        with pytest.raises(ChangedSettingsError) as refusal:
            refuse_upstream_change(stored, now)
        option = "rollout.val_num_responses" if stored.is_held_out else "sampling.num_responses"
        assert f"  {option}: 2 -> 8" in str(refusal.value).splitlines()
