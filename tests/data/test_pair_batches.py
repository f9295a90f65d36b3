import pyarrow as pa
import pytest
import torch

from rlhf_pl.data.pair_batches import GroupDataset, RoundBatches, RoundLoader
from rlhf_pl.data.stored_groups import pair_copies, stored_numbers
from rlhf_pl.data.update_plan import UpdatePlan


def dataset(count: int, reference: bool = False) -> GroupDataset:
    """Pair i: prompt [i, i], chosen [100 + i], rejected [200 + i] * (i + 1)."""
    pairs = pa.table(
        {
            "prompt_id": [f"p{i}" for i in range(count)],
            "prompt_tokens": [[i, i] for i in range(count)],
            "chosen_tokens": [[100 + i] for i in range(count)],
            "rejected_tokens": [[200 + i] * (i + 1) for i in range(count)],
            "chosen_reward": [float(i) for i in range(count)],
            "rejected_reward": [-float(i) for i in range(count)],
        }
    )
    logps = {f"{which}_{name}_logp": [float(i + k) for i in range(count)]
             for k, (which, name) in enumerate((w, n) for w in ("chosen", "rejected")
                                               for n in (("old", "reference") if reference else ("old",)))}  # fmt: skip
    groups = pair_copies(pairs)
    return GroupDataset(groups, stored_numbers(pa.table(logps), groups), temperature=0.8)


def test_batch_holds_a_tree_per_pair() -> None:
    batch = dataset(4, reference=True).batch([1, 2], weight=0.5)
    assert batch.rows.input_ids.tolist() == [[1, 1, 101, 201, 201, 2, 2, 102, 202, 202, 202]]
    assert batch.rows.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 2, 3, 4]]
    assert batch.rows.logit_positions.tolist() == [1, 1, 3, 6, 6, 8, 9]
    assert batch.rows.targets.tolist() == [101, 201, 201, 102, 202, 202, 202]
    assert batch.rows.response_ids.tolist() == [0, 1, 1, 2, 3, 3, 3]
    assert batch.rows.lengths == ((2, 1, 2), (2, 1, 3))
    assert batch.rewards.tolist() == [1.0, -1.0, 2.0, -2.0]
    assert batch.stored["old_logps"].tolist() == [1.0, 3.0, 2.0, 4.0]  # of pair i: i, and i + 2
    assert set(batch.stored) == {"old_logps", "reference_logps"}
    assert (len(batch), batch.weight, batch.temperature) == (2, 0.5, 0.8)


def test_rewards_and_logps_stay_float32_under_half_precision() -> None:
    from lightning.pytorch.plugins.precision import HalfPrecision

    batch = HalfPrecision("bf16-true").convert_input(dataset(3).batch([0, 1]))
    assert batch.rewards.dtype == batch.stored["old_logps"].dtype == torch.float32


def test_order_is_a_function_of_seed_and_round() -> None:
    plan = UpdatePlan(10, batch_size=2)
    order = list(RoundBatches(plan, "1:0"))
    assert order == list(RoundBatches(plan, "1:0"))
    assert order != list(RoundBatches(plan, "1:1"))
    assert sorted(i for batch, _ in order for i in batch) == list(range(10))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("pairs", [1, 7, 8, 9, 23])
def test_every_pair_counts_the_same_in_its_update(pairs: int, world_size: int) -> None:
    """Over an update, Lightning's 1 / accumulate and the ranks' mean turn the weights into 1 / pairs of the update."""
    plan = UpdatePlan(pairs, batch_size=2, accumulate=2, world_size=world_size)
    ranks = [list(RoundBatches(plan, "x", rank)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    used = sorted(i for batches in ranks for batch, weight in batches for i in batch if weight > 0)
    assert used == list(range(pairs))
    assert all(batch for batches in ranks for batch, _ in batches)  # a rank without a pair takes one that counts 0
    for start in range(0, len(ranks[0]), 2):
        share: dict[int, float] = {}
        for batches in ranks:
            for indices, weight in batches[start : start + 2]:
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
    ranks = [RoundBatches(plan, "x", rank, lengths) for rank in range(world_size)]
    count = ranks[0].accumulate
    assert {(len(r), r.accumulate) for r in ranks} == {(len(ranks[0]), count)}
    batches = [list(r) for r in ranks]
    assert all(sum(lengths[i] for i in indices) <= 150 for b in batches for indices, _ in b)
    expected = [sorted(i for micro in u for part in micro for i in part) for u in plain.divide(ranks[0]._order(), None)]
    assert -(-len(batches[0]) // count) == len(expected) == plan.updates
    for number, update in enumerate(expected):
        share: dict[int, float] = {}
        for of_rank in batches:
            for indices, weight in of_rank[number * count : (number + 1) * count]:
                share |= {i: weight / len(indices) / count / world_size for i in indices if weight > 0}
        assert sorted(share) == update
        assert list(share.values()) == pytest.approx([1 / len(update)] * len(update))


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_goes_on_where_it_was(workers: int) -> None:
    def loader() -> RoundLoader:
        return RoundLoader(dataset(10), RoundBatches(UpdatePlan(10, 2), "1:3"), 3, workers)

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
    assert [batch.rewards.tolist() for batch in resumed] == expected  # only the resumed pass is short


def test_state_of_another_round_is_ignored() -> None:
    loader = RoundLoader(dataset(4), RoundBatches(UpdatePlan(4, 2), "1:3"), 3)
    loader.load_state_dict({"round": 2, "batches": 1})
    assert len(list(loader)) == 2


def test_a_limited_epoch_weighs_what_is_left_of_an_update() -> None:
    """7 pairs in micro-batches of 2, 2 an update, limited to 3: [2, 2] and [2], each update the mean over its own."""
    batches = RoundBatches(UpdatePlan(7, 2, 2), "0")
    batches.limit = 3
    assert [(len(pairs), weight) for pairs, weight in batches] == [(2, 1.0), (2, 1.0), (2, 2.0)]
    assert len(batches.steps()) == 4  # the whole epoch's, for what is computed of all its pairs
