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

GROUPS_AT_ONCE = 4096  # limits the per-token log-probs that are in memory at a time


# Not a dataclass: Lightning's precision plugins would cast its rewards and log-probs to bf16.
class GroupBatch:
    """G packed prompt groups, with their pairs where the loss is on pairs.

    Args:
        rows: G prefix groups, each a prompt with the responses that are used: R responses of M tokens in total.
        rewards: Shaped rewards, shape (R,), float32, reward units.
        finished: Whether each response ends with an EOS, shape (R,), bool.
        sizes: Number of responses of each group, shape (G,), int64.
        stored: Log-probs under pi_old and the reference, by their names in `PolicyLoss.needs`; shape (R,), or (M,) if
            per token; float32, nats.
        temperature: The sampling temperature of the responses.
        weights: For each term of the loss, the factor on its mean over this batch that makes an update's gradient the
            mean over all elements of the update.
        pair_rows: See `PromptGroups`.
        pair_sizes: See `PromptGroups`.
    """

    def __init__(
        self,
        rows: PackedBatch,
        rewards: Tensor,
        finished: Tensor,
        sizes: Tensor,
        stored: Mapping[str, Tensor],
        temperature: float,
        weights: tuple[float, ...] = (1.0,),
        pair_rows: Tensor | None = None,
        pair_sizes: Tensor | None = None,
    ) -> None:
        self.rows = rows
        self.rewards = rewards
        self.finished = finished
        self.sizes = sizes
        self.stored = dict(stored)
        self.temperature = temperature
        self.weights = weights
        self.pair_rows, self.pair_sizes = pair_rows, pair_sizes

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def weight(self) -> float:
        """The factor of a loss with one term, which is any but a sum of losses."""
        (weight,) = self.weights
        return weight

    @property
    def counts(self) -> bool:
        """Whether the batch counts; a rank without a batch of its own repeats one that does not."""
        return any(weight > 0 for weight in self.weights)

    def to(self, device: torch.device | str, **kwargs: Any) -> "GroupBatch":
        """The batch on `device`; Lightning calls it."""
        stored = {name: to_device(values, device) for name, values in self.stored.items()}
        rewards, finished, sizes = (to_device(values, device) for values in (self.rewards, self.finished, self.sizes))
        pairs = (None if values is None else to_device(values, device) for values in (self.pair_rows, self.pair_sizes))
        rows = self.rows.to(device)
        return GroupBatch(rows, rewards, finished, sizes, stored, self.temperature, self.weights, *pairs)

    def groups(self, token_logps: Tensor, kl_coef: float = 0.0) -> PromptGroups:
        """The input of the loss.

        Args:
            token_logps: Log-probs under the policy, shape (M,), float32, nats.
            kl_coef: Weight of the KL penalty in the rewards, reward units per nat.
        """
        rewards = apply_kl_penalty(self.rewards, kl_coef, self.stored)
        logps, lengths = self.rows.sum_per_response(token_logps), self.rows.counts
        numbers = (rewards, lengths, self.finished, self.sizes, self.stored)
        return PromptGroups(token_logps, logps, *numbers, self.pair_rows, self.pair_sizes)


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
        self.has_single_pairs = groups.pairs is not None and groups.pairs.are_simple

    def __len__(self) -> int:
        return len(self.stored)

    def lengths(self) -> list[int]:
        """Number of tokens of each group."""
        return self.stored.lengths()

    def sizes(self, loss: PolicyLoss, kl_coef: float = 0.0) -> list[list[int] | None]:
        """For each term of a loss, the number of its elements in each group; None if each group has one."""
        return [None if term.per in ("pair", "group") else self._elements(term, kl_coef) for _, term in loss.terms]

    def _elements(self, loss: PolicyLoss, kl_coef: float) -> list[int]:
        if not loss.leaves_out:
            lengths = torch.from_numpy(self.stored.response_lengths().astype(np.int64))
            return self.stored.sum_per_group(loss.counts(lengths, self.finished).numpy()).tolist()
        counts: list[int] = []
        for start in range(0, len(self), GROUPS_AT_ONCE):
            numbers = range(start, min(start + GROUPS_AT_ONCE, len(self)))
            groups = self.groups_before_training(numbers, kl_coef, torch.device("cpu"), with_tokens=False)
            counts += groups.sum_per_group(loss.counts_in(groups).double()).long().tolist()
        return counts

    def batch(self, indices: Sequence[int], weights: tuple[float, ...] = (1.0,)) -> GroupBatch:
        """The groups at `indices`."""
        rows = pack([self.stored.prefix_group(i) for i in indices])
        members = [self.stored.rows(i) for i in indices]
        responses = torch.from_numpy(np.concatenate(members))
        stored = {name: _select(values, responses) for name, values in self.logps.items()}
        sizes = torch.tensor([len(part) for part in members])
        rewards, finished = self.rewards[responses], self.finished[responses]
        pairs = self._pairs(indices, members)
        return GroupBatch(rows, rewards, finished, sizes, stored, self.temperature, weights, *pairs)

    def _pairs(self, indices: Sequence[int], members: Sequence[np.ndarray]) -> tuple[Tensor | None, Tensor | None]:
        """`pair_rows` and `pair_sizes` of a batch of the groups at `indices`, whose responses are `members`."""
        pairs = self.stored.pairs
        if pairs is None or self.has_single_pairs:
            return None, None
        starts = np.concatenate([[0], np.cumsum([len(part) for part in members])])
        own = [pairs.of_group(i) for i in indices]
        rows = np.concatenate([part + start for part, start in zip(own, starts, strict=False)])
        return torch.from_numpy(rows.T.copy()), torch.tensor([len(part) for part in own])

    def groups_before_training(
        self, indices: Sequence[int], kl_coef: float, device: torch.device, with_tokens: bool = True
    ) -> PromptGroups:
        """The input of the loss, on `device`, for a policy that equals pi_old.

        If log-probs under pi_old are not stored, those under the reference are used instead, or 0. Without
        `with_tokens`, those of tokens are 0.
        """
        members = [self.stored.rows(i) for i in indices]
        responses = torch.from_numpy(np.concatenate(members))
        sizes = torch.tensor([len(part) for part in members], device=device)
        lengths = torch.from_numpy(self.stored.response_lengths().astype(np.int64))[responses].to(device)
        known = {name: values for name, values in self.logps.items() if with_tokens or isinstance(values, Tensor)}
        stored = {name: _select(values, responses).to(device) for name, values in known.items()}
        zeros = torch.zeros(int(lengths.sum()), device=device)
        token_logps = stored.get("old_token_logps", stored.get("reference_token_logps", zeros))
        logps = stored.get("old_logps", stored.get("reference_logps", torch.zeros(len(responses), device=device)))
        rewards = apply_kl_penalty(self.rewards[responses].to(device), kl_coef, stored)
        pairs = (None if values is None else values.to(device) for values in self._pairs(indices, members))
        finished = self.finished[responses].to(device)
        return PromptGroups(token_logps, logps, rewards, lengths, finished, sizes, stored, *pairs)

    def __getitems__(self, request: tuple[list[int], tuple[float, ...]]) -> GroupBatch | None:
        indices, weights = request
        return self.batch(indices, weights) if indices else None


def _select(values: Tensor | pa.ListArray, responses: Tensor) -> Tensor:
    """The log-probs of the selected responses; lists of per-token log-probs are concatenated."""
    if isinstance(values, Tensor):
        return values[responses]
    return torch.from_numpy(np.concatenate([values[i].values.to_numpy() for i in responses.tolist()]))
