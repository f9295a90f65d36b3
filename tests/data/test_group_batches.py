"""Batches of prompt groups: packed tokens, rewards and log-probs."""

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from rlhf_pl import PolicyLoss, PromptGroups
from rlhf_pl.data.group_batches import GroupDataset
from rlhf_pl.data.stored_groups import read_pair_copies, read_stored_logps
from rlhf_pl.utils.errors import InputError


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


class Forgetful(PolicyLoss):
    """Counts one response of two, and gives values for both."""

    needs = frozenset({"old_logps"})
    per = "response"

    def counts(self, lengths: Tensor, finished: Tensor) -> Tensor:
        return (lengths > 1).long()

    def losses(self, groups: PromptGroups) -> Tensor:
        return groups.logps - groups.old_logps


def test_a_loss_must_leave_out_what_it_does_not_count() -> None:
    """Pair i has responses of 1 and of i + 1 tokens: three pairs have two responses above one token."""
    with pytest.raises(InputError, match="returned 6 values for 6 responses with 2 elements"):
        make_dataset(3).sizes(Forgetful())


def test_groups_without_pairs_have_no_chosen_responses() -> None:
    ones = torch.ones(4)
    groups = PromptGroups(ones, ones, ones, ones.long(), ones.bool(), torch.tensor([4]), {})
    with pytest.raises(InputError, match="on_pairs = True"):
        groups.pairs(ones)
    with pytest.raises(InputError, match="on_pairs = True"):
        _ = groups.is_chosen
