"""The order of an epoch's micro-batches, and a loader that resumes in the middle of an epoch."""

import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from rlhf_pl.data.update_plan import RankBatches, UpdatePlan


class Repeated(list[int]):
    """What a rank without pairs of its own in a micro-batch trains on: it has no weight and counts in no metric.

    A micro-batch of its own may have no weight as well, where the loss leaves all its elements out.
    """


class MicroBatchSampler(Sampler):
    """Yields (pair indices, loss weights) for each micro-batch of one rank: a pure function of (seed, epoch, rank).

    A pair may also be a prompt group, or a row of SFT examples.

    Args:
        plan: Divides the pairs of an epoch into updates and micro-batches.
        order_seed: Seed of the order, made of the run's seed and the epoch.
        rank: Rank of this process.
        lengths: Number of tokens of each pair. If given, the pairs of each update are sorted by length, so that those
            of a micro-batch are of similar length. The update keeps its pairs.
        sizes: For each term of the loss, the number of its elements in each pair; None if every pair has one. The
            gradient of an update is the mean over elements.
    """

    def __init__(
        self,
        plan: UpdatePlan,
        order_seed: str,
        rank: int = 0,
        lengths: Sequence[int] | None = None,
        sizes: Sequence[Sequence[int] | None] = (None,),
    ) -> None:
        self.plan, self.order_seed, self.rank, self.lengths, self.sizes = plan, order_seed, rank, lengths, sizes
        self.skip = 0
        self.limit: int | None = None  # maximum micro-batches; a truncated update is the mean over the pairs left in it

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        skip, self.skip = self.skip, 0  # on the first `next`: loaders with workers create an iterator they never use
        yield from self._batches[skip:]

    @cached_property
    def _updates(self) -> list[list[RankBatches]]:
        return self.plan.divide(self._order(), self.lengths)

    def steps(self) -> list[list[list[int]]]:
        """Indices of the pairs of each micro-batch and rank."""
        return [micro_batch for update in self._updates for micro_batch in update]

    def all_steps(self) -> list[list[list[int]]]:
        """The same, and micro-batches of the pairs that no update uses, where the updates are too few for all."""
        return self.steps() + [step for update in self._unused_updates for step in update]

    @cached_property
    def _unused_updates(self) -> list[list[RankBatches]]:
        return self.plan.divide(self._unused(), self.lengths)

    def _unused(self) -> list[int]:
        return sorted(set(range(self.plan.pairs)) - set(self._order()))

    @property
    def accumulate(self) -> int:
        """Micro-batches per update; the last update may have fewer."""
        if self.plan.max_tokens is None and not self.plan.repeats:
            return self.plan.accumulate
        return max(map(len, self._updates), default=1)

    @cached_property
    def _batches(self) -> list[tuple[Any, ...]]:
        batches: list[tuple[Any, ...]] = []
        no_weight = (0.0,) * len(self.sizes)
        for number, full_update in enumerate(self._updates):
            first = len(batches)
            update = full_update if self.limit is None else full_update[: max(0, self.limit - len(batches))]
            pairs = [i for micro_batch in update for part in micro_batch for i in part]
            for micro_batch in update:
                own = micro_batch[self.rank]
                # strategies need a step from every rank: a rank without a pair repeats one with weight 0
                batches.append((own, self._weights(own, pairs)) if own else (Repeated(pairs[:1]), no_weight))
            if update:
                batches[first] = (*batches[first], *self._ahead(number, update))
        return batches or [
            ([], no_weight)
        ]  # Lightning ends a run whose loader is empty, but skips a batch that is None

    def _ahead(self, number: int, update: list[RankBatches]) -> tuple[Any, ...]:
        """What an update's first micro-batch has in addition, for what must be computed before the update."""
        return ()

    def _order(self) -> list[int]:
        """The order of all passes, each shuffled separately. No update contains a pair twice."""
        order: list[int] = []
        used_pairs = self.plan.used_pairs
        for number in range(-(-used_pairs // max(1, self.plan.pairs))):
            once = list(range(self.plan.pairs))
            random.Random(self.order_seed + (f":{number}" if number else "")).shuffle(once)
            started = len(order) % self.plan.pairs_per_update
            if started:  # fill the update that the pass before started
                used = set(order[-started:])
                fill = [i for i in once if i not in used][: self.plan.pairs_per_update - started]
                filled = set(fill)
                once = fill + [i for i in once if i not in filled]
            order += once
        return order[:used_pairs]

    def _weights(self, own: list[int], update: list[int]) -> tuple[float, ...]:
        """Factors on each term's mean over `own` that make Lightning's mean the mean over the update.

        Lightning divides each micro-batch's loss by `accumulate` and averages over ranks.
        """
        shares = (
            len(own) / len(update)
            if sizes is None
            else sum(sizes[i] for i in own) / max(1, sum(sizes[i] for i in update))
            for sizes in self.sizes
        )
        return tuple(self.accumulate * self.plan.world_size * share for share in shares)


class ResumableLoader(DataLoader):
    """A loader that Lightning can resume in the middle of an epoch.

    Its length is that of the whole epoch even after a resume, because Lightning compares its batch counter with it.
    """

    def __init__(self, dataset: Dataset, batches: MicroBatchSampler, round_index: int, num_workers: int = 0) -> None:
        self.round_index = round_index  # of the round or epoch; `checkpointing.progress` reads it
        self._yielded = 0
        super().__init__(
            dataset,
            batch_sampler=batches,
            collate_fn=_identity,
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(0),  # otherwise every `iter` advances the global generator
        )

    def __iter__(self) -> Any:
        self._yielded = self.batch_sampler.skip  # type: ignore[union-attr]
        for batch in super().__iter__():
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"round": self.round_index, "batches": self._yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["round"] == self.round_index:
            self.batch_sampler.skip = state["batches"]  # type: ignore[union-attr]


class EmptyLoader(list):
    """The loader of a finished run; it accepts the state of any loader."""

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def _identity(batch: Any) -> Any:
    return batch
