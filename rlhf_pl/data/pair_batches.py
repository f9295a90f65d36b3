"""Pairs of a round as training batches: rows, order, and a loader that resumes."""

import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rlhf_pl.data.update_plan import UpdatePlan
from rlhf_pl.models.packed_batch import PackedBatch, PrefixGroup, pack
from rlhf_pl.models.packed_layout import to_device


# Not a dataclass that Lightning looks into: precision plugins would cast rewards and log-probs to bf16.
class PairBatch:
    """B pairs.

    Args:
        rows: B trees: a prompt with its chosen and its rejected answer.
        rewards: Shape (2, B), float32: chosen, rejected.
        old_logps: Summed log-probs under the policy that generated the round, shape (2, B), float32, nats.
        reference_logps: The same under the fixed reference, or None where no KL penalty is wanted.
        temperature: The temperature the responses were drawn at.
        weight: Factor on the mean loss of this batch, so that an update's gradient is the mean over its pairs.
    """

    def __init__(
        self,
        rows: PackedBatch,
        rewards: Tensor,
        old_logps: Tensor,
        reference_logps: Tensor | None,
        temperature: float,
        weight: float = 1.0,
    ) -> None:
        self.rows = rows
        self.rewards = rewards
        self.old_logps = old_logps
        self.reference_logps = reference_logps
        self.temperature = temperature
        self.weight = weight

    def __len__(self) -> int:
        return self.rewards.shape[1]

    def to(self, device: torch.device | str, **kwargs: Any) -> "PairBatch":
        """The batch on `device`; Lightning calls it."""
        reference = None if self.reference_logps is None else to_device(self.reference_logps, device)
        return PairBatch(
            self.rows.to(device),
            to_device(self.rewards, device),
            to_device(self.old_logps, device),
            reference,
            self.temperature,
            self.weight,
        )


class PairDataset(Dataset):
    """The pairs of one round, read from its store's tables as they are needed.

    Args:
        pairs: The `pairs` stage.
        logps: The `logps` stage, row by row beside it.
        temperature: The sampling temperature of the round.
    """

    def __init__(self, pairs: pa.Table, logps: pa.Table, temperature: float) -> None:
        if len(pairs) != len(logps):
            raise ValueError(f"{len(pairs)} pairs but {len(logps)} rows of log-probs.")
        self.temperature = temperature
        self.prompt_ids = pairs["prompt_id"]
        self._tokens = {name: pairs[name].combine_chunks() for name in ("prompt_tokens", *_TOKENS)}
        self.rewards = _both(pairs, "chosen_reward", "rejected_reward")
        self.old_logps = _both(logps, "chosen_old_logp", "rejected_old_logp")
        reference = ("chosen_reference_logp", "rejected_reference_logp")
        self.reference_logps = _both(logps, *reference) if reference[0] in logps.column_names else None

    def __len__(self) -> int:
        return self.rewards.shape[1]

    def tree(self, index: int) -> PrefixGroup:
        """The prompt of a pair with its chosen and its rejected answer."""
        prompt, *answers = (self._tokens[n][index].values.to_numpy() for n in ("prompt_tokens", *_TOKENS))
        return PrefixGroup(prompt, tuple(answers))

    def lengths(self) -> list[int]:
        """Tokens of each pair."""
        return sum(self._tokens[n].value_lengths().to_numpy() for n in ("prompt_tokens", *_TOKENS)).tolist()

    def batch(self, indices: Sequence[int], weight: float = 1.0) -> PairBatch:
        """The pairs at `indices`."""
        rows = pack([self.tree(i) for i in indices])
        index = torch.as_tensor(list(indices))
        reference = None if self.reference_logps is None else self.reference_logps[:, index]
        return PairBatch(rows, self.rewards[:, index], self.old_logps[:, index], reference, self.temperature, weight)

    def __getitems__(self, request: tuple[list[int], float]) -> PairBatch | None:
        indices, weight = request
        return self.batch(indices, weight) if indices else None


_TOKENS = ("chosen_tokens", "rejected_tokens")


def _both(table: pa.Table, chosen: str, rejected: str) -> Tensor:
    """Two columns as a float32 tensor of shape (2, rows)."""
    return torch.stack([torch.tensor(table[name].to_numpy(), dtype=torch.float32) for name in (chosen, rejected)])


class RoundBatches(Sampler):
    """(pair indices, loss weight) for each micro-batch of one rank: a pure function of (seed, round, rank).

    Args:
        plan: How the round's pairs divide into updates and micro-batches.
        order_seed: Made of the run's seed and the round.
        rank: This process.
        lengths: Of each pair; where given, the pairs of an update are sorted by it, so that a micro-batch's rows are
            alike. The update sees the same pairs.
        sizes: What each pair counts; where given, weights make an update's gradient the mean over these instead of
            over pairs.
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
