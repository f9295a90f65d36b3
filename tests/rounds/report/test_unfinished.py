from pathlib import Path

import pytest

from rlhf_pl.rounds.report.unfinished import describe_unfinished
from rlhf_pl.store.round_store import RoundStore


@pytest.mark.parametrize(("after", "is_said"), [(0.35, True), (0.45, False), (0.9, False), (None, False)])
def test_a_fall_of_finished_responses_is_said(tmp_path: Path, after: float | None, is_said: bool) -> None:
    store = RoundStore(tmp_path)
    for version, share in ((0, 0.6), (2, after)):
        if share is not None:
            store.held_out(version).update(settings={"responses": {"seed": 1}})
            store.held_out(version).complete("responses", finished_share=share)
    text = describe_unfinished(store, 2)
    assert bool(text) == is_said
    if is_said:
        assert text.startswith("35% of the responses to the held-out prompts finish, 60% at the start")
        assert str(tmp_path / "samples.html") in text
