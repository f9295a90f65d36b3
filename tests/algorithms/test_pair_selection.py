from rlhf_pl.algorithms.pair_selection import BestWorst, RandomPair


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
