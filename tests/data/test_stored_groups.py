"""What a round trains on, as it is stored now and as earlier versions stored it."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch

from rlhf_pl.data.group_batches import GroupDataset
from rlhf_pl.data.stored_groups import GROUPS, PAIRS, order_ties, read_stored_groups, read_stored_logps
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.models.packed_batch import PackedBatch
from rlhf_pl.rounds.stages import store_logps
from rlhf_pl.rounds.stages.logps import steps_by_length
from rlhf_pl.store.round_store import DamagedStoreError, Round

TOKENS = pa.list_(pa.int32())
PROMPTS = {"a": [1, 2], "b": [3]}
RESPONSES = [("a", 0, [10]), ("a", 1, [11, 12]), ("a", 2, [13, 14, 15]), ("b", 0, [16]), ("b", 1, [17, 18])]
CHOSEN = [("b", 1, 0), ("a", 1, 0), ("a", 2, 0)]  # response 0 of "a" is in two pairs


def reward(prompt_id: str, index: int) -> float:
    return index + 0.5 * (prompt_id == "b")


def store(folder: Path, table: pa.Table, **info: Any) -> Round:
    """A round with two shards of responses, and with `table` as its stage `pairs`."""
    stored = Round(folder / "rounds" / "0000")
    for number, rows in enumerate((RESPONSES[:3], RESPONSES[3:])):
        columns = {
            "prompt_id": [p for p, _, _ in rows],
            "response_index": pa.array([i for _, i, _ in rows], pa.int32()),
            "finished": [i > 0 for _, i, _ in rows],
            "prompt_tokens": pa.array([PROMPTS[p] for p, _, _ in rows], TOKENS),
            "response_tokens": pa.array([t for _, _, t in rows], TOKENS),
        }
        stored.write_shard("responses", number, pa.table(columns))
    stored.complete("responses")
    stored.write_shard("pairs", 0, table)
    stored.complete("pairs", **info)
    return stored


def pairs_table(copies: bool = False) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for prompt_id, chosen, rejected in CHOSEN:
        rows.append({"prompt_id": prompt_id, "chosen_index": chosen, "rejected_index": rejected})
        rows[-1] |= {"chosen_reward": reward(prompt_id, chosen), "rejected_reward": reward(prompt_id, rejected)}
        if copies:
            tokens = {(p, i): t for p, i, t in RESPONSES}
            of = {"chosen_tokens": tokens[prompt_id, chosen], "rejected_tokens": tokens[prompt_id, rejected]}
            rows[-1] |= {"prompt_tokens": PROMPTS[prompt_id], **of}
    return pa.Table.from_pylist(rows) if copies else pa.Table.from_pylist(rows, schema=PAIRS)


class Counting:
    """A policy whose log-probs are minus the tokens' ids; it counts them."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, rows: PackedBatch, temperature: float) -> torch.Tensor:
        self.seen += rows.targets.tolist()
        return -rows.targets.float()


@pytest.mark.parametrize("copies", [False, True])
def test_batches_are_the_same_from_indices_and_from_copies(tmp_path: Path, copies: bool) -> None:
    stored = store(tmp_path, pairs_table(copies))
    store_logps(stored, {"old": Counting()}, steps_by_length(8, Ranks()), 1.0, needs={"old_token_logps"})
    groups = read_stored_groups(stored)
    assert groups.lengths() == [4, 5, 6]
    dataset = GroupDataset(groups, read_stored_logps(stored.read("logps"), groups), 1.0)
    batch = dataset.batch([2, 0])
    assert batch.rows.input_ids.tolist() == [[1, 2, 13, 14, 15, 10, 3, 17, 18, 16]]
    assert batch.rewards.tolist() == [2.0, 0.0, 1.5, 0.5]
    assert batch.stored["old_logps"].tolist() == [-42.0, -10.0, -35.0, -16.0]
    assert batch.stored["old_token_logps"].tolist() == [-13.0, -14.0, -15.0, -10.0, -17.0, -18.0, -16.0]
    assert copies or batch.finished.tolist() == [True, False, True, False]


def test_a_response_in_two_pairs_is_stored_once(tmp_path: Path) -> None:
    """On two ranks each response is one rank's, or their sum would count it twice."""
    stored = store(tmp_path, pairs_table())

    class Halves(Ranks):
        """One of two ranks, which are asked one after the other."""

        totals: ClassVar[list[torch.Tensor]] = []

        def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
            self.totals.append(tensor)
            return tensor

        def run_on_rank_zero(self, action: Any) -> Any:
            return None

    for number in range(2):
        ranks = Halves()
        ranks.rank, ranks.size = number, 2
        store_logps(stored, {"old": Counting()}, steps_by_length(1, ranks), 1.0, ranks=ranks)
    assert torch.stack(Halves.totals).sum(0).tolist() == [-10.0, -23.0, -42.0, -16.0, -35.0]
    assert (torch.stack(Halves.totals) == 0).sum(0).tolist() == [1] * 5


def test_the_pairs_of_a_prompt_are_a_group_with_each_response_once(tmp_path: Path) -> None:
    groups = read_stored_groups(store(tmp_path, pairs_table(), grouped=True))
    assert [tuple(map(list, (t.prompt, *t.responses))) for t in map(groups.prefix_group, range(2))] == [
        ([3], [17, 18], [16]),
        ([1, 2], [11, 12], [10], [13, 14, 15]),  # in the order of their first use
    ]
    batch = GroupDataset(groups, {}, 1.0).batch([1, 0])
    assert batch.rewards.tolist() == [1.0, 0.0, 2.0, 1.5, 0.5]
    inputs = batch.groups(torch.zeros(len(batch.rows.targets)))
    assert inputs.pairs(batch.rewards).tolist() == [[1.0, 2.0, 1.5], [0.0, 0.0, 0.5]]
    assert inputs.mean_per_prompt(torch.tensor([1.0, 3.0, 5.0])).tolist() == [2.0, 5.0]
    assert inputs.is_chosen.tolist() == [True, False, True, True, False]


def test_a_tie_is_ordered_by_the_penalties(tmp_path: Path) -> None:
    table = pairs_table()
    table = table.set_column(3, "chosen_reward", pa.array([0.5, 0.0, 2.0])).set_column(
        4, "rejected_reward", pa.array([0.5, 0.0, 0.0])
    )
    groups = read_stored_groups(store(tmp_path, table))
    penalties = np.array([1.0, 2.0, 3.0, 4.0, 3.0])  # in the order of RESPONSES
    inputs = GroupDataset(order_ties(groups, penalties), {}, 1.0).batch([0, 1, 2]).groups(torch.zeros(11))
    assert inputs.pairs(torch.tensor(penalties[[4, 3, 1, 0, 2, 0]])).tolist() == [[3.0, 1.0, 3.0], [4.0, 2.0, 1.0]]


def test_a_round_without_pairs_has_no_ties_to_order(tmp_path: Path) -> None:
    groups = read_stored_groups(store(tmp_path, pairs_table().slice(0, 0)))
    assert len(order_ties(groups, np.zeros(0))) == 0


def test_whole_groups(tmp_path: Path) -> None:
    rows = [{"prompt_id": p, "response_index": i, "reward": reward(p, i)} for p, i, _ in RESPONSES]
    groups = read_stored_groups(store(tmp_path, pa.Table.from_pylist(rows, schema=GROUPS)))
    assert groups.pairs is None
    assert [tuple(map(list, (t.prompt, *t.responses))) for t in map(groups.prefix_group, range(2))] == [
        ([1, 2], [10], [11, 12], [13, 14, 15]),
        ([3], [16], [17, 18]),
    ]
    assert groups.sum_per_group(np.array([1, 1, 1, 1, 1])).tolist() == [3, 2]


def test_a_response_that_is_gone_is_damage(tmp_path: Path) -> None:
    rows = [{"prompt_id": "a", "response_index": i, "reward": 0.0} for i in (0, 3)]
    with pytest.raises(DamagedStoreError, match=r"names responses that .* lacks"):
        read_stored_groups(store(tmp_path, pa.Table.from_pylist(rows, schema=GROUPS)))
