"""Rewards after penalties and normalisation, worked by hand."""

import pytest

from rlhf_pl.algorithms.reward_shaping import RewardShaping, shape_rewards
from rlhf_pl.utils.errors import InputError

REWARDS, LENGTHS, FINISHED = [[1.0, 3.0], [2.0, 2.0]], [[10, 30], [5, 5]], [[True, False], [True, True]]


def shaped(**options: object) -> list[list[float]]:
    return shape_rewards(REWARDS, LENGTHS, FINISHED, RewardShaping(**options))[0]  # type: ignore[arg-type]


def test_penalties() -> None:
    assert shaped() == REWARDS
    assert shaped(missing_eos_penalty=5) == [[1, -2], [2, 2]]
    assert shaped(missing_eos_reward=-1) == [[1, -1], [2, 2]]
    assert shaped(length_penalty=0.1, length_free_tokens=10) == [[1, pytest.approx(1)], [2, 2]]


def test_normalisation() -> None:
    """The mean is 2 and the squared deviations are 1, 1, 0, 0: the standard deviation is sqrt(1/2)."""
    root = 2**0.5
    assert shaped(normalize="round") == [[pytest.approx(-root), pytest.approx(root)], [0, 0]]
    assert shaped(normalize="prompt") == [[-1, 1], [0, 0]]
    assert shaped(normalize="round", missing_eos_reward=1)[0] == [pytest.approx(-1), pytest.approx(-1)]


def test_mean_penalties_and_statistics_of_the_round_are_returned() -> None:
    _, metrics = shape_rewards(REWARDS, LENGTHS, FINISHED, RewardShaping(missing_eos_penalty=4, normalize="round"))
    assert metrics == {"missing_eos": 1.0, "round_mean": 1.0, "round_std": pytest.approx(1.5**0.5)}
    with pytest.raises(InputError, match="length_penalty` must be 0 or more"):
        RewardShaping(length_penalty=-1)
