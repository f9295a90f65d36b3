"""Training batches of the prompt groups of a round. A pair is a group of two."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rlhf_pl.algorithms.policy_loss import PolicyLoss, element_losses
from rlhf_pl.algorithms.prompt_groups import OLD_VALUES, VALUES, Z_REF, PromptGroups, apply_kl_penalty, segment_sums
from rlhf_pl.data.ahead import Ahead, Mismatched
from rlhf_pl.data.group_parts import BatchParts, GroupParts, batch_parts, split_groups
from rlhf_pl.data.group_sampler import AheadRequest
from rlhf_pl.data.micro_batches import Repeated
from rlhf_pl.data.round_values import RoundValues, check_round_values
from rlhf_pl.data.stored_groups import StoredGroups, StoredLogps
from rlhf_pl.models.packed_batch import PackedBatch, pack
from rlhf_pl.models.packed_layout import to_device
from rlhf_pl.utils.errors import InputError

GROUPS_AT_ONCE = 4096  # limits the per-token log-probs that are in memory at a time
_GROUPS_TO_CHECK = 64


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
        parts: Which tokens of its groups `rows` has, if some of them are split; the other numbers are of whole groups.
        ahead: What is computed before the update that this batch is the first of; None for nothing.
        counts: Whether the batch counts in metrics; a rank without a batch of its own repeats one that does not.
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
        parts: BatchParts | None = None,
        ahead: Ahead | None = None,
        counts: bool = True,
    ) -> None:
        self.rows = rows
        self.rewards = rewards
        self.finished = finished
        self.sizes = sizes
        self.stored = dict(stored)
        self.temperature = temperature
        self.weights = weights
        self.pair_rows, self.pair_sizes = pair_rows, pair_sizes
        self.parts, self.ahead, self.counts = parts, ahead, counts

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def weight(self) -> float:
        """The factor of a loss with one term, which is any but a sum of losses."""
        (weight,) = self.weights
        return weight

    def to(self, device: torch.device | str, **kwargs: Any) -> "GroupBatch":
        """The batch on `device`; Lightning calls it."""
        stored = {name: to_device(values, device) for name, values in self.stored.items()}
        rewards, finished, sizes = (to_device(values, device) for values in (self.rewards, self.finished, self.sizes))
        pairs = [None if values is None else to_device(values, device) for values in (self.pair_rows, self.pair_sizes)]
        parts = None if self.parts is None else self.parts.to(device)
        ahead = None if self.ahead is None else self.ahead.to(device)
        numbers = (self.rows.to(device), rewards, finished, sizes, stored, self.temperature, self.weights)
        return GroupBatch(*numbers, pairs[0], pairs[1], parts, ahead, self.counts)

    def groups(
        self,
        token_logps: Tensor,
        kl_coef: float = 0.0,
        known: Mapping[int, Tensor] | None = None,
        numbers_of_update: Mapping[str, Tensor] | None = None,
        further: Mapping[str, Tensor] | None = None,
        known_further: Mapping[str, Mapping[int, Tensor]] | None = None,
    ) -> PromptGroups:
        """The input of the loss.

        Args:
            token_logps: Log-probs of the tokens of `rows` under the policy, float32, nats.
            kl_coef: Weight of the KL penalty in the rewards, reward units per nat.
            known: Log-probs of all tokens of the groups that are split, by their indices, without gradient.
            numbers_of_update: Numbers of shape () that the whole update has in common, by name: `Z_REF`.
            further: Other numbers of the tokens of `rows`, by name: the values of a critic.
            known_further: The same as `known`, of these.
        """
        further, known_further = dict(further or {}), known_further or {}
        rewards = apply_kl_penalty(self.rewards, kl_coef, self.stored)
        lengths = self.rows.counts
        if self.parts is not None:
            lengths = self.parts.lengths
            token_logps = self.parts.complete(token_logps, known or {})
            further = {n: self.parts.complete(values, known_further.get(n, {})) for n, values in further.items()}
        logps = segment_sums(token_logps, to_device(lengths, token_logps.device))
        numbers = (rewards, lengths, self.finished, self.sizes, {**self.stored, **(numbers_of_update or {}), **further})
        return PromptGroups(token_logps, logps, *numbers, self.pair_rows, self.pair_sizes, kl_coef)


class GroupDataset(Dataset):
    """The prompt groups of one round; tokens and per-token log-probs stay in Arrow until they are batched.

    Args:
        groups: The groups that the round trains on.
        logps: Log-probs of their responses, by their names in `PolicyLoss.needs`.
        temperature: The sampling temperature of the round.
    """

    def __init__(self, groups: StoredGroups, logps: StoredLogps, temperature: float) -> None:
        self.stored, self.temperature = groups, temperature
        self.logps = {name: values for name, values in logps.items() if name != Z_REF}
        self.mismatched_reference_logps = logps.get(Z_REF)
        self.rewards = torch.tensor(groups.rewards, dtype=torch.float32)
        self.finished = torch.from_numpy(groups.finished.copy())
        # what micro-batches are made of; the DataModule changes it where groups are larger than its token budget
        self.parts = split_groups(groups, None)
        self.mismatched: GroupParts | None = None
        self.values = RoundValues(groups, {})  # what the loss computes of the whole round
        self.has_single_pairs = groups.pairs is not None and groups.pairs.are_simple

    def __len__(self) -> int:
        return len(self.stored)

    @torch.no_grad()
    def compute_values(self, loss: PolicyLoss, kl_coef: float) -> None:
        """Have the loss compute what it needs of the whole round: see `PolicyLoss.of_round`."""

        def read() -> Iterator[PromptGroups]:
            for start in range(0, len(self), GROUPS_AT_ONCE):
                numbers = range(start, min(start + GROUPS_AT_ONCE, len(self)))
                yield self.groups_before_training(numbers, kl_coef, torch.device("cpu"))

        found: dict[str, Tensor] = {}
        for _, term in loss.terms:
            if term.round_values and len(self):
                values = {name: value.cpu() for name, value in term.of_round(read).items()}
                check_round_values(term, values)
                found |= values
        self.values = RoundValues(self.stored, found)

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
        if len(self):
            self._check_counts(loss, kl_coef)
        counts: list[int] = []
        for start in range(0, len(self), GROUPS_AT_ONCE):
            numbers = range(start, min(start + GROUPS_AT_ONCE, len(self)))
            groups = self.groups_before_training(numbers, kl_coef, torch.device("cpu"), with_tokens=False)
            counts += groups.sum_per_group(loss.counts_in(groups).double()).long().tolist()
        return counts

    @torch.no_grad()
    def _check_counts(self, loss: PolicyLoss, kl_coef: float) -> None:
        """Refuse a loss that counts other elements than it gives values for; the first groups show it."""
        numbers = range(min(len(self), _GROUPS_TO_CHECK))
        groups = self.groups_before_training(numbers, kl_coef, torch.device("cpu"))
        groups = replace(groups, stored={Z_REF: torch.zeros(()), **groups.stored})  # a single prompt has none
        counted, values = int(loss.counts_in(groups).sum()), len(element_losses(loss, groups))
        if counted != values:
            raise InputError(
                f"`model.loss`: {type(loss).__name__}.losses returned {values} values for {len(groups.lengths)} "
                f"responses with {counted} elements by its `counts` or `counts_in`. Leave out the same ones in both."
            )

    def batch(
        self, items: Sequence[int], weights: tuple[float, ...] = (1.0,), ahead: AheadRequest | None = None
    ) -> GroupBatch:
        """The groups, or parts of groups, at `items`; with what is computed ahead of their update."""
        indices = self.parts.group_of[list(items)].tolist()
        rows = pack([self.parts.items.prefix_group(i) for i in items])
        members = [self.stored.rows(i) for i in indices]
        responses = torch.from_numpy(np.concatenate(members))
        stored = {name: _select(values, responses) for name, values in self.logps.items()} | self.values.select(indices)
        sizes = torch.tensor([len(part) for part in members])
        rewards, finished = self.rewards[responses], self.finished[responses]
        pairs = self._pairs(indices, members)
        more = (self._parts_of(items), None if ahead is None else self._ahead(ahead))
        numbers = (rows, rewards, finished, sizes, stored, self.temperature, weights)
        return GroupBatch(*numbers, *pairs, *more, counts=not isinstance(items, Repeated))

    def _parts_of(self, items: Sequence[int]) -> BatchParts | None:
        if not any(map(self.parts.is_part, items)):
            return None
        return batch_parts(self.parts, self.stored, items)

    def _ahead(self, request: AheadRequest) -> Ahead:
        parts = tuple(
            (pack([self.parts.items.prefix_group(i) for i in items]), batch_parts(self.parts, self.stored, items))
            for items in request.parts
        )
        mismatched = tuple(self._mismatched(items, counts) for items, counts in request.mismatched)
        return Ahead(parts, mismatched)

    def _mismatched(self, items: Sequence[int], counts: bool) -> Mismatched:
        assert self.mismatched is not None
        assert isinstance(self.mismatched_reference_logps, Tensor)
        groups = self.mismatched.items
        responses = torch.from_numpy(np.concatenate([groups.rows(i) for i in items]))
        rows = pack([groups.prefix_group(i) for i in items])
        return Mismatched(rows, self.mismatched_reference_logps[responses], counts)

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
        """The input of the loss, on `device`, for a policy that equals pi_old, and a critic that equals the old one.

        If log-probs under pi_old are not stored, those under the reference are used instead, or 0. Without
        `with_tokens`, those of tokens are 0.
        """
        members = [self.stored.rows(i) for i in indices]
        responses = torch.from_numpy(np.concatenate(members))
        sizes = torch.tensor([len(part) for part in members], device=device)
        lengths = torch.from_numpy(self.stored.response_lengths().astype(np.int64))[responses].to(device)
        known = {name: values for name, values in self.logps.items() if with_tokens or isinstance(values, Tensor)}
        stored = {name: _select(values, responses).to(device) for name, values in known.items()}
        stored |= {name: values.to(device) for name, values in self.values.select(indices).items()}
        if self.mismatched_reference_logps is not None:
            stored[Z_REF] = torch.zeros((), device=device)
        if OLD_VALUES in stored:
            stored[VALUES] = stored[OLD_VALUES]
        zeros = torch.zeros(int(lengths.sum()), device=device)
        token_logps = stored.get("old_token_logps", stored.get("reference_token_logps", zeros))
        logps = stored.get("old_logps", stored.get("reference_logps", torch.zeros(len(responses), device=device)))
        rewards = apply_kl_penalty(self.rewards[responses].to(device), kl_coef, stored)
        rows, counts = (None if values is None else values.to(device) for values in self._pairs(indices, members))
        finished = self.finished[responses].to(device)
        return PromptGroups(token_logps, logps, rewards, lengths, finished, sizes, stored, rows, counts, kl_coef)

    def __getitems__(self, request: tuple[Any, ...]) -> GroupBatch | None:
        """The batch of a request of `GroupSampler`: (items, weights), or (items, weights, what is computed ahead)."""
        return self.batch(*request) if request[0] else None


def _select(values: Tensor | pa.ListArray, responses: Tensor) -> Tensor:
    """The log-probs of the selected responses; lists of per-token log-probs are concatenated."""
    if isinstance(values, Tensor):
        return values[responses]
    return torch.from_numpy(np.concatenate([values[i].values.to_numpy() for i in responses.tolist()]))
