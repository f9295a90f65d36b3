"""Batches of prompt groups: packed tokens, rewards and log-probs."""

import pyarrow as pa
import torch

from rlhf_pl.data.group_batches import GroupDataset
from rlhf_pl.data.stored_groups import read_pair_copies, read_stored_logps


def make_dataset(count: int, reference: bool = False) -> GroupDataset:
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
    groups = read_pair_copies(pairs)
    return GroupDataset(groups, read_stored_logps(pa.table(logps), groups), temperature=0.8)


def test_batch_holds_a_prefix_group_per_pair() -> None:
    batch = make_dataset(4, reference=True).batch([1, 2], weights=(0.5,))
    assert batch.rows.input_ids.tolist() == [[1, 1, 101, 201, 201, 2, 2, 102, 202, 202, 202]]
    assert batch.rows.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 2, 3, 4]]
    assert batch.rows.logit_positions.tolist() == [1, 1, 3, 6, 6, 8, 9]
    assert batch.rows.targets.tolist() == [101, 201, 201, 102, 202, 202, 202]
    assert batch.rows.response_ids.tolist() == [0, 1, 1, 2, 3, 3, 3]
    assert batch.rows.lengths == ((2, 1, 2), (2, 1, 3))
    assert batch.rewards.tolist() == [1.0, -1.0, 2.0, -2.0]
    assert batch.stored["old_logps"].tolist() == [1.0, 3.0, 2.0, 4.0]  # i and i + 2 for pair i
    assert set(batch.stored) == {"old_logps", "reference_logps"}
    assert (len(batch), batch.weights, batch.temperature) == (2, (0.5,), 0.8)


def test_rewards_and_logps_stay_float32_under_half_precision() -> None:
    from lightning.pytorch.plugins.precision import HalfPrecision

    batch = HalfPrecision("bf16-true").convert_input(make_dataset(3).batch([0, 1]))
    assert batch.rewards.dtype == batch.stored["old_logps"].dtype == torch.float32
