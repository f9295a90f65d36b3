"""Prompt groups of a round as training batches: tokens, order, and a loader that resumes. A pair is a group of two."""

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.algorithms.prompt_groups import PromptGroups, penalised
from rlhf_pl.data.stored_groups import Numbers, StoredGroups
from rlhf_pl.data.update_plan import UpdatePlan
from rlhf_pl.models.packed_batch import PackedBatch, pack
from rlhf_pl.models.packed_layout import to_device


# Not a dataclass that Lightning looks into: precision plugins would cast rewards and log-probs to bf16.
class GroupBatch:
    """G prompt groups, packed; of pairs a group is a pair.

    Args:
        rows: G prefix groups: a prompt with those of its responses that are used, R in all, M tokens.
        rewards: Shaped, shape (R,), float32, reward units.
        finished: Whether each response ended with an EOS, shape (R,), bool.
        sizes: Responses of each group, shape (G,), int64.
        stored: Log-probs of the policies that do not train, by their names in `PolicyLoss.needs`, of shape (R,), or
            (M,) where they are per token; float32, nats.
        temperature: The temperature that the responses were sampled at.
        weight: Factor on the mean loss of this batch, so that an update's gradient is the mean over all its elements.
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
        """What the loss sees of the batch.

        Args:
            token_logps: The policy's, shape (M,), float32, nats.
            kl_coef: Weight of the KL penalty in the rewards, reward units per nat.
        """
        rewards = penalised(self.rewards, kl_coef, self.stored)
        logps, lengths = self.rows.sum_per_response(token_logps), self.rows.counts
        return PromptGroups(token_logps, logps, rewards, lengths, self.finished, self.sizes, self.stored)


class GroupDataset(Dataset):
    """The prompt groups of one round; tokens and per-token numbers stay in Arrow until their batch.

    Args:
        groups: What the round trains on.
        numbers: Log-probs of its responses, by their names in `PolicyLoss.needs`.
        temperature: The sampling temperature of the round.
    """

    def __init__(self, groups: StoredGroups, numbers: Numbers, temperature: float) -> None:
        self.stored, self.numbers, self.temperature = groups, numbers, temperature
        self.rewards = torch.tensor(groups.rewards, dtype=torch.float32)
        self.finished = torch.from_numpy(groups.finished.copy())

    def __len__(self) -> int:
        return len(self.stored)

    def lengths(self) -> list[int]:
        """Tokens of each group."""
        return self.stored.lengths()

    def counts(self, loss: PolicyLoss) -> list[int] | None:
        """Elements of a loss in each group; None where each group counts alike."""
        if loss.per in ("pair", "group"):
            return None
        lengths = torch.from_numpy(self.stored.response_lengths().astype(np.int64))
        return self.stored.sum_per_group(loss.counts(lengths, self.finished).numpy()).tolist()

    def batch(self, indices: Sequence[int], weight: float = 1.0) -> GroupBatch:
        """The groups at `indices`."""
        rows = pack([self.stored.tree(i) for i in indices])
        members = [self.stored.rows(i) for i in indices]
        places = torch.from_numpy(np.concatenate(members))
        stored = {name: _at(values, places) for name, values in self.numbers.items()}
        sizes = torch.tensor([len(part) for part in members])
        rewards, finished = self.rewards[places], self.finished[places]
        return GroupBatch(rows, rewards, finished, sizes, stored, self.temperature, weight)

    def before_training(self, indices: Sequence[int], kl_coef: float, device: torch.device) -> PromptGroups:
        """What a loss sees of groups as long as the policy is the one that sampled them, on `device`.

        Where its log-probs are not stored, those of the reference take their place, or 0.
        """
        members = [self.stored.rows(i) for i in indices]
        places = torch.from_numpy(np.concatenate(members))
        sizes = torch.tensor([len(part) for part in members], device=device)
        lengths = torch.from_numpy(self.stored.response_lengths().astype(np.int64))[places].to(device)
        stored = {name: _at(values, places).to(device) for name, values in self.numbers.items()}
        zeros = torch.zeros(int(lengths.sum()), device=device)
        tokens = stored.get("old_token_logps", stored.get("reference_token_logps", zeros))
        sums = stored.get("old_logps", stored.get("reference_logps", torch.zeros(len(places), device=device)))
        rewards = penalised(self.rewards[places].to(device), kl_coef, stored)
        return PromptGroups(tokens, sums, rewards, lengths, self.finished[places].to(device), sizes, stored)

    def __getitems__(self, request: tuple[list[int], float]) -> GroupBatch | None:
        indices, weight = request
        return self.batch(indices, weight) if indices else None


def _at(values: Tensor | pa.ListArray, places: Tensor) -> Tensor:
    """The numbers of some responses; of lists those of their tokens, one response after the other."""
    if isinstance(values, Tensor):
        return values[places]
    return torch.from_numpy(np.concatenate([values[i].values.to_numpy() for i in places.tolist()]))


class RoundBatches(Sampler):
    """(pair indices, loss weight) for each micro-batch of one rank: a pure function of (seed, round, rank).

    Args:
        plan: How the round's pairs divide into updates and micro-batches.
        order_seed: Made of the run's seed and the round.
        rank: This process.
        lengths: Of each pair; where given, the pairs of an update are sorted by it, so that a micro-batch's rows are
            alike. The update sees the same pairs.
        sizes: Elements of the loss in each pair or group; where given, an update's gradient is the mean over these
            instead of over pairs.
    """

    def __init__(
        self,
        plan: UpdatePlan,
        order_seed: str,
        rank: int = 0,
        lengths: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self.plan, self.order_seed, self.rank, self.lengths, self.sizes = plan, order_seed, rank, lengths, sizes
        self.skip = 0
        self.limit: int | None = None  # micro-batches that are wanted; an update that is cut is the mean over its rest

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[list[int], float]]:
        skip, self.skip = self.skip, 0  # at the first batch: loaders with workers make an iterator that they never use
        yield from self._batches[skip:]

    @cached_property
    def _updates(self) -> list[list[list[list[int]]]]:
        return self.plan.divide(self._order(), self.lengths)

    def steps(self) -> list[list[list[int]]]:
        """Pairs of each micro-batch, of each rank."""
        return [micro_batch for update in self._updates for micro_batch in update]

    @property
    def accumulate(self) -> int:
        """Micro-batches per update; the last update may have fewer."""
        if self.plan.max_tokens is None and self.plan.passes == 1:
            return self.plan.accumulate
        return max(map(len, self._updates), default=1)

    @cached_property
    def _batches(self) -> list[tuple[list[int], float]]:
        batches: list[tuple[list[int], float]] = []
        for whole in self._updates:
            update = whole if self.limit is None else whole[: max(0, self.limit - len(batches))]
            everything = [i for micro_batch in update for part in micro_batch for i in part]
            for micro_batch in update:
                mine = micro_batch[self.rank]
                # strategies need a step from every rank: where there is no pair for it, one that does not count
                batches.append((mine, self._weight(mine, everything)) if mine else (everything[:1], 0.0))
        return batches or [([], 0.0)]  # Lightning ends a run whose loader is empty; a None batch it passes over

    def _order(self) -> list[int]:
        """Every pass is shuffled anew; the update in which one ends and the next begins has no pair of both."""
        order: list[int] = []
        for number in range(self.plan.passes):
            once = list(range(self.plan.pairs))
            random.Random(self.order_seed + (f":{number}" if number else "")).shuffle(once)
            begun = len(order) % self.plan.pairs_per_update
            if begun:
                there = set(order[-begun:])
                fill = [i for i in once if i not in there][: self.plan.pairs_per_update - begun]
                taken = set(fill)
                once = fill + [i for i in once if i not in taken]
            order += once
        return order

    def _weight(self, mine: list[int], update: list[int]) -> float:
        """Factor on the mean over `mine`, so that Lightning's mean over micro-batches and ranks is that of the update.

        Lightning divides each micro-batch's loss by `accumulate` and averages over ranks.
        """
        share = len(mine) / len(update)
        if self.sizes is not None:
            share = sum(self.sizes[i] for i in mine) / max(1, sum(self.sizes[i] for i in update))
        return self.accumulate * self.plan.world_size * share


class RoundLoader(DataLoader):
    """A loader that Lightning can resume in the middle of its round.

    It reports its full length also after a resume, because Lightning compares its batch counter to that.
    """

    def __init__(self, dataset: Dataset, batches: RoundBatches, round_index: int, num_workers: int = 0) -> None:
        self.round_index = round_index
        self._given = 0
        super().__init__(
            dataset,
            batch_sampler=batches,
            collate_fn=_identity,
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(0),  # else every `iter` draws from the global stream
        )

    def __iter__(self) -> Any:
        self._given = self.batch_sampler.skip  # type: ignore[union-attr]
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"round": self.round_index, "batches": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["round"] == self.round_index:
            self.batch_sampler.skip = state["batches"]  # type: ignore[union-attr]


class NoBatches(list):
    """The loader of a run in which nothing is left to train; it takes any loader's state."""

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def _identity(batch: Any) -> Any:
    return batch
