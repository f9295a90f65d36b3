"""A rank is killed, in any phase and under any launcher: the others end in time and name it."""

from pathlib import Path

import pytest

from tests.soak.kill_ranks import kill_one

WITHIN = 30.0  # seconds
pytestmark = [pytest.mark.slow(minutes=1.5), pytest.mark.xdist_group("ranks")]


@pytest.mark.parametrize(
    ("launcher", "phase", "rank"),  # every value once; `tests/soak/kill_ranks.py` tries all combinations
    [("lightning", "generation", 0), ("torchrun", "training", 1)],
)
def test_the_other_rank_ends_and_names_the_dead_one(launcher: str, phase: str, rank: int, tmp_path: Path) -> None:
    outcome = kill_one(tmp_path, launcher, phase, rank, "on", WITHIN)
    assert outcome.seconds is not None, outcome.log
    assert outcome.named.startswith(f"error: rank {rank} (process "), outcome.log
    assert outcome.log.count("has died") == 1, outcome.log


@pytest.mark.exhaustive
def test_without_the_watch_a_rank_lives_on_when_rank_0_was_killed(tmp_path: Path) -> None:
    """The reason for the watch: if this test fails one day, check whether the watch is still needed."""
    outcome = kill_one(tmp_path, "lightning", "generation", 0, "off", WITHIN / 2)
    assert outcome.seconds is None, outcome.log
    assert not outcome.named, outcome.log
