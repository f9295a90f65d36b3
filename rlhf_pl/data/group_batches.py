"""Training batches of the prompt groups of a round. A pair is a group of two."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.algorithms.prompt_groups import PromptGroups, apply_kl_penalty
from rlhf_pl.data.stored_groups import StoredGroups, StoredLogps
from rlhf_pl.models.packed_batch import PackedBatch, pack
from rlhf_pl.models.packed_layout import to_device


# Not a dataclass: Lightning's precision plugins would cast its rewards and log-probs to bf16.
class GroupBatch:
    """G packed prompt groups; a group may be a pair.

    Args:
        rows: G prefix groups, each a prompt with the responses that are used: R responses of M tokens in total.
        rewards: Shaped rewards, shape (R,), float32, reward units.
        finished: Whether each response ends with an EOS, shape (R,), bool.
        sizes: Number of responses of each group, shape (G,), int64.
        stored: Log-probs under pi_old and the reference, by their names in `PolicyLoss.needs`; shape (R,), or (M,) if
            per token; float32, nats.
        temperature: The sampling temperature of the responses.
        weight: Factor on the mean loss of this batch that makes an update's gradient the mean over all its elements.
    """

    def __init__(
        self,
        rows: PackedBatch,
        rewards: Tensor,
        finished: Tensor,
        sizes: Tensor,
        stored: Mapping[str, Tensor],
        temperature: float,
        weight: float = 1.0,
    ) -> None:
        self.rows = rows
        self.rewards = rewards
        self.finished = finished
        self.sizes = sizes
        self.stored = dict(stored)
        self.temperature = temperature
        self.weight = weight

    def __len__(self) -> int:
        return len(self.sizes)

    def to(self, device: torch.device | str, **kwargs: Any) -> "GroupBatch":
        """The batch on `device`; Lightning calls it."""
        stored = {name: to_device(values, device) for name, values in self.stored.items()}
        rewards, finished, sizes = (to_device(values, device) for values in (self.rewards, self.finished, self.sizes))
        return GroupBatch(self.rows.to(device), rewards, finished, sizes, stored, self.temperature, self.weight)

    def groups(self, token_logps: Tensor, kl_coef: float = 0.0) -> PromptGroups:
        """The input of the loss.

        Args:
            token_logps: Log-probs under the policy, shape (M,), float32, nats.
            kl_coef: Weight of the KL penalty in the rewards, reward units per nat.
        """
        rewards = apply_kl_penalty(self.rewards, kl_coef, self.stored)
        logps, lengths = self.rows.sum_per_response(token_logps), self.rows.counts
        return PromptGroups(token_logps, logps, rewards, lengths, self.finished, self.sizes, self.stored)


class GroupDataset(Dataset):
    """The prompt groups of one round; tokens and per-token log-probs stay in Arrow until they are batched.

    Args:
        groups: The groups that the round trains on.
        logps: Log-probs of their responses, by their names in `PolicyLoss.needs`.
        temperature: The sampling temperature of the round.
    """

    def __init__(self, groups: StoredGroups, logps: StoredLogps, temperature: float) -> None:
        self.stored, self.logps, self.temperature = groups, logps, temperature
        self.rewards = torch.tensor(groups.rewards, dtype=torch.float32)
        self.finished = torch.from_numpy(groups.finished.copy())

    def __len__(self) -> int:
        return len(self.stored)

    def lengths(self) -> list[int]:
        """Number of tokens of each group."""
        return self.stored.lengths()

    def counts(self, loss: PolicyLoss) -> list[int] | None:
        """Number of loss elements in each group; None if all groups have the same weight."""
        if loss.per in ("pair", "group"):
            return None
        lengths = torch.from_numpy(self.stored.response_lengths().astype(np.int64))
        return self.stored.sum_per_group(loss.counts(lengths, self.finished).numpy()).tolist()

    def batch(self, indices: Sequence[int], weight: float = 1.0) -> GroupBatch:
        """The groups at `indices`."""
        rows = pack([self.stored.prefix_group(i) for i in indices])
        members = [self.stored.rows(i) for i in indices]
        responses = torch.from_numpy(np.concatenate(members))
        stored = {name: _select(values, responses) for name, values in self.logps.items()}
        sizes = torch.tensor([len(part) for part in members])
        rewards, finished = self.rewards[responses], self.finished[responses]
        return GroupBatch(rows, rewards, finished, sizes, stored, self.temperature, weight)

    def groups_before_training(self, indices: Sequence[int], kl_coef: float, device: torch.device) -> PromptGroups:
        """The input of the loss, on `device`, for a policy that equals pi_old.

        If log-probs under pi_old are not stored, those under the reference are used instead, or 0.
        """
        members = [self.stored.rows(i) for i in indices]
        responses = torch.from_numpy(np.concatenate(members))
        sizes = torch.tensor([len(part) for part in members], device=device)
        lengths = torch.from_numpy(self.stored.response_lengths().astype(np.int64))[responses].to(device)
        stored = {name: _select(values, responses).to(device) for name, values in self.logps.items()}
        zeros = torch.zeros(int(lengths.sum()), device=device)
        token_logps = stored.get("old_token_logps", stored.get("reference_token_logps", zeros))
        logps = stored.get("old_logps", stored.get("reference_logps", torch.zeros(len(responses), device=device)))
        rewards = apply_kl_penalty(self.rewards[responses].to(device), kl_coef, stored)
        return PromptGroups(token_logps, logps, rewards, lengths, self.finished[responses].to(device), sizes, stored)

    def __getitems__(self, request: tuple[list[int], float]) -> GroupBatch | None:
        indices, weight = request
        return self.batch(indices, weight) if indices else None


def _select(values: Tensor | pa.ListArray, responses: Tensor) -> Tensor:
    """The log-probs of the selected responses; lists of per-token log-probs are concatenated."""
    if isinstance(values, Tensor):
        return values[responses]
    return torch.from_numpy(np.concatenate([values[i].values.to_numpy() for i in responses.tolist()]))
