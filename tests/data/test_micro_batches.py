"""The order and weights of micro-batches, and loaders that resume in the middle of an epoch."""

import pytest

from rlhf_pl.data.micro_batches import MicroBatchSampler, ResumableLoader
from rlhf_pl.data.update_plan import UpdatePlan
from tests.data.test_group_batches import make_dataset


def test_order_depends_on_seed_and_epoch_only() -> None:
    plan = UpdatePlan(10, batch_size=2)
    order = list(MicroBatchSampler(plan, "1:0"))
    assert order == list(MicroBatchSampler(plan, "1:0"))
    assert order != list(MicroBatchSampler(plan, "1:1"))
    assert sorted(i for batch, _ in order for i in batch) == list(range(10))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("pairs", [1, 7, 8, 9, 23])
def test_all_pairs_of_an_update_have_the_same_weight(pairs: int, world_size: int) -> None:
    """Over an update, Lightning's 1 / accumulate and the ranks' mean turn the weights into 1 / pairs of the update."""
    plan = UpdatePlan(pairs, batch_size=2, accumulate=2, world_size=world_size)
    ranks = [list(MicroBatchSampler(plan, "x", rank)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    used = sorted(i for batches in ranks for batch, (weight,) in batches for i in batch if weight > 0)
    assert used == list(range(pairs))
    assert all(batch for batches in ranks for batch, _ in batches)  # a rank without a pair repeats one with weight 0
    for start in range(0, len(ranks[0]), 2):
        share: dict[int, float] = {}
        for batches in ranks:
            for indices, (weight,) in batches[start : start + 2]:
                for i in indices if weight > 0 else ():
                    share[i] = weight / len(indices) / plan.accumulate / world_size
        assert sum(share.values()) == pytest.approx(1.0)
        assert len({round(s, 9) for s in share.values()}) == 1
    assert plan.updates == -(-len(ranks[0]) // 2)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("pairs", [1, 13, 40])
def test_token_budgets_divide_updates_without_changing_their_pairs(pairs: int, world_size: int) -> None:
    lengths = [7 + 13 * (i % 9) for i in range(pairs)]
    plain = UpdatePlan(pairs, 4, 3, world_size)
    plan = UpdatePlan(pairs, 4, 3, world_size, max_tokens=150)
    ranks = [MicroBatchSampler(plan, "x", rank, lengths) for rank in range(world_size)]
    count = ranks[0].accumulate
    assert {(len(r), r.accumulate) for r in ranks} == {(len(ranks[0]), count)}
    batches = [list(r) for r in ranks]
    assert all(sum(lengths[i] for i in indices) <= 150 for b in batches for indices, _ in b)
    expected = [sorted(i for micro in u for part in micro for i in part) for u in plain.divide(ranks[0]._order(), None)]
    assert -(-len(batches[0]) // count) == len(expected) == plan.updates
    for number, update in enumerate(expected):
        share: dict[int, float] = {}
        for of_rank in batches:
            for indices, (weight,) in of_rank[number * count : (number + 1) * count]:
                share |= {i: weight / len(indices) / count / world_size for i in indices if weight > 0}
        assert sorted(share) == update
        assert list(share.values()) == pytest.approx([1 / len(update)] * len(update))


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_resumes_after_the_last_batch(workers: int) -> None:
    def loader() -> ResumableLoader:
        return ResumableLoader(make_dataset(10), MicroBatchSampler(UpdatePlan(10, 2), "1:3"), 3, workers)

    expected = [batch.rewards.tolist() for batch in loader()]
    first = loader()
    iterator = iter(first)
    for _ in range(2):
        next(iterator)
    state = first.state_dict()
    assert state == {"round": 3, "batches": 2}
    resumed = loader()
    resumed.load_state_dict(state)
    assert len(resumed) == 5
    assert [batch.rewards.tolist() for batch in resumed] == expected[2:]
    assert [batch.rewards.tolist() for batch in resumed] == expected  # only the first pass after a resume skips batches


def test_state_of_another_epoch_is_ignored() -> None:
    loader = ResumableLoader(make_dataset(4), MicroBatchSampler(UpdatePlan(4, 2), "1:3"), 3)
    loader.load_state_dict({"round": 2, "batches": 1})
    assert len(list(loader)) == 2


def test_a_truncated_update_is_the_mean_over_its_remaining_pairs() -> None:
    """7 pairs in micro-batches of 2, 2 per update, limited to 3: updates [2, 2] and [2], each with its own mean."""
    batches = MicroBatchSampler(UpdatePlan(7, 2, 2), "0")
    batches.limit = 3
    assert [(len(pairs), *weights) for pairs, weights in batches] == [(2, 1.0), (2, 1.0), (2, 2.0)]
    assert len(batches.steps()) == 4  # `steps` is not limited


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(("pairs", "updates"), [(50, 7), (50, 1), (5, 4), (12, 1), (13, 9)])
def test_fixed_updates_use_pairs_evenly_and_never_twice_in_an_update(pairs: int, updates: int, world_size: int) -> None:
    plan = UpdatePlan(pairs, batch_size=2, accumulate=2, world_size=world_size, fixed_updates=updates)
    sampler = MicroBatchSampler(plan, "x")
    order, size = sampler._order(), min(pairs, 4 * world_size)
    assert plan.updates == updates == len(sampler._updates)
    assert len(order) == updates * size
    assert all(len(set(order[i : i + size])) == size for i in range(0, len(order), size))
    uses = [order.count(pair) for pair in range(pairs)]
    assert max(uses) - min(uses) <= 1
    steps = [i for step in sampler.all_steps() for part in step for i in part]
    assert set(steps) == set(range(pairs))  # also those without an update, whose log-probs a round's loss may need


def test_a_round_without_pairs_has_no_update() -> None:
    assert UpdatePlan(0, batch_size=2, fixed_updates=468).updates == 0
