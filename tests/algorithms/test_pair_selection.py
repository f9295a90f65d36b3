from typing import Any

import pytest

from rlhf_pl.algorithms.pair_selection import AllPairs, BestVsRest, BestWorst, LengthMatched, RandomPair
from rlhf_pl.algorithms.reward_shaping import break_ties
from rlhf_pl.utils.errors import InputError


def test_best_against_worst() -> None:
    assert BestWorst()([0.1, 0.9, -1.0, 0.9], [1] * 4, [True] * 4, 0) == [(1, 2)]


def test_equal_rewards_give_no_pair() -> None:
    assert BestWorst()([0.5, 0.5], [1, 2], [True, True], 0) == []
    assert RandomPair()([0.5, 0.5], [1, 2], [True, True], 0) == []


def test_margin_floor_drops_close_pairs() -> None:
    assert BestWorst(min_margin=0.5)([0.0, 0.5], [1, 1], [True, True], 0) == []
    assert BestWorst(min_margin=0.4)([0.0, 0.5], [1, 1], [True, True], 0) == [(1, 0)]


def test_random_pairs_are_ordered_seeded_and_cover_all() -> None:
    rewards = [0.0, 1.0, 2.0]
    sampled = [RandomPair()(rewards, [1] * 3, [True] * 3, seed)[0] for seed in range(60)]
    assert all(rewards[chosen] > rewards[rejected] for chosen, rejected in sampled)
    assert set(sampled) == {(1, 0), (2, 0), (2, 1)}
    assert sampled == [RandomPair()(rewards, [1] * 3, [True] * 3, seed)[0] for seed in range(60)]


def test_all_pairs_with_a_margin_floor_and_a_cap() -> None:
    """Rewards 0, 2, 2, 1: six pairs, of which one is a tie; five differ by more than 0.5, and two by more than 1."""
    rewards, rest = [0.0, 2.0, 2.0, 1.0], ([1] * 4, [True] * 4)
    assert AllPairs()(rewards, *rest, 0) == [(1, 0), (2, 0), (3, 0), (1, 2), (1, 3), (2, 3)]
    assert AllPairs(min_margin=0.5)(rewards, *rest, 0) == [(1, 0), (2, 0), (3, 0), (1, 3), (2, 3)]
    assert AllPairs(min_margin=1)(rewards, *rest, 0) == [(1, 0), (2, 0)]
    capped = {seed: AllPairs(max_pairs=2)(rewards, *rest, seed) for seed in range(40)}
    assert {len(pairs) for pairs in capped.values()} == {2}
    assert {pair for pairs in capped.values() for pair in pairs} == set(AllPairs()(rewards, *rest, 0))


def test_the_best_response_against_each_worse_one() -> None:
    assert BestVsRest()([0.0, 2.0, 2.0, 1.0], [1] * 4, [True] * 4, 0) == [(1, 0), (1, 3)]
    assert BestVsRest(min_margin=1)([0.0, 2.0, 2.0, 1.0], [1] * 4, [True] * 4, 0) == [(1, 0)]


def test_pairs_of_similar_length() -> None:
    """The widest margin is between 10 and 20 tokens; within 20 %, only 10 and 12 tokens are a pair."""
    assert LengthMatched()([3.0, 0.0, 2.5], [10, 20, 12], [True] * 3, 0) == [(0, 2)]
    assert LengthMatched(max_difference=0.5)([3.0, 0.0, 2.5], [10, 20, 12], [True] * 3, 0) == [(0, 1)]
    assert LengthMatched(min_margin=0.5)([3.0, 0.0, 2.5], [10, 20, 12], [True] * 3, 0) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AllPairs(max_pairs=0), "max_pairs"),
        (lambda: AllPairs(min_margin=-1), "min_margin"),
        (lambda: BestVsRest(min_margin=float("nan")), "min_margin"),
        (lambda: LengthMatched(max_difference=1), "max_difference` must be below 1"),
    ],
)
def test_wrong_options_are_refused(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("selector", [BestWorst, AllPairs, BestVsRest, LengthMatched])
def test_broken_ties_are_not_above_a_margin_floor(selector: Any) -> None:
    """Scores 0, 1, 1 and a floor of 1: breaking the tie makes one of the margins larger by a rounding error."""
    rewards = break_ties([1.0, 1.0, 0.0], ["a", "b", "c"], 1)
    assert max(rewards) - min(rewards) > 1
    assert selector(min_margin=1.0)(rewards, [5] * 3, [True] * 3, 0) == []
    assert len(selector(min_margin=0.9)(rewards, [5] * 3, [True] * 3, 0)) in (1, 2)
