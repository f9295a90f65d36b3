"""The micro-batches of prompt groups, with what is computed ahead of each update."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from rlhf_pl.data.group_parts import GroupParts
from rlhf_pl.data.micro_batches import MicroBatchSampler
from rlhf_pl.data.update_plan import RankBatches, UpdatePlan


class AheadRequest(NamedTuple):
    """What one rank computes before an update's first micro-batch. All ranks have equally many batches.

    Args:
        parts: Items of each micro-batch of this rank that contains parts of split groups; then those of another rank.
        mismatched: Items of each batch of responses under the prompts of other groups, and whether it counts.
    """

    parts: list[list[int]]
    mismatched: list[tuple[list[int], bool]]


class GroupSampler(MicroBatchSampler):
    """Yields (items, loss weights) for each micro-batch of one rank: see `MicroBatchSampler`.

    The first micro-batch of an update has an `AheadRequest` as well, where something is computed ahead. A group that is
    split has its whole weight with each of its parts, because the gradient of the group is the sum of theirs.

    Args:
        plan: Divides the groups of an epoch into updates and micro-batches.
        order_seed: Seed of the order.
        rank: Rank of this process.
        parts: The items, groups or parts of them.
        by_length: Whether the items of a micro-batch are of similar length.
        sizes: For each term of the loss, the number of its elements in each group; None if every group has one.
        mismatched: The items of the same groups under other prompts, if their log-probs are needed.
    """

    def __init__(
        self,
        plan: UpdatePlan,
        order_seed: str,
        rank: int,
        parts: GroupParts,
        by_length: bool,
        sizes: Sequence[Sequence[int] | None] = (None,),
        mismatched: GroupParts | None = None,
    ) -> None:
        super().__init__(plan, order_seed, rank, parts.items.lengths() if by_length else None, sizes)
        self.parts, self.by_length, self.mismatched = parts, by_length, mismatched

    @cached_property
    def _updates(self) -> list[list[RankBatches]]:
        return self.plan.divide(self._order(), self.lengths, self.parts.split)

    @cached_property
    def _unused_updates(self) -> list[list[RankBatches]]:
        return self.plan.divide(self._unused(), self.lengths, self.parts.split)

    @cached_property
    def _mismatched_updates(self) -> list[list[RankBatches]]:
        if self.mismatched is None:
            return [[] for _ in self._updates]
        lengths = self.mismatched.items.lengths() if self.by_length else None
        return self.plan.divide(self._order(), lengths, self.mismatched.split)

    def mismatched_steps(self) -> list[RankBatches]:
        """Indices of the mismatched items of each batch and rank."""
        steps = [step for update in self._mismatched_updates for step in update]
        if self.mismatched is None or not (unused := self._unused()):
            return steps
        lengths = self.mismatched.items.lengths() if self.by_length else None
        updates = self.plan.divide(unused, lengths, self.mismatched.split)
        return steps + [step for update in updates for step in update]

    def _weights(self, own: list[int], update: list[int]) -> tuple[float, ...]:
        return super()._weights(self.parts.group_of[own].tolist(), self.parts.groups(update))

    def _ahead(self, number: int, update: list[RankBatches]) -> tuple[Any, ...]:
        if not self.parts.split and self.mismatched is None:
            return ()
        groups = set(self.parts.groups([item for step in update for part in step for item in part]))
        request = AheadRequest(self._parts_ahead(number, groups), self._mismatched_ahead(number, groups))
        return (request,) if request.parts or request.mismatched else ()

    def _parts_ahead(self, number: int, groups: set[int]) -> list[list[int]]:
        """This rank's micro-batches with parts of `groups`, also those that a limit leaves out."""
        wanted = {item for group in groups for item in self.parts.split.get(group, ())}
        steps = self._updates[number]
        of_ranks = [
            [step[rank] for step in steps if not wanted.isdisjoint(step[rank])] for rank in range(len(steps[0]))
        ]
        own, longest = of_ranks[self.rank], max(of_ranks, key=len)
        return own + longest[len(own) :]  # strategies need equally many calls on every rank

    def _mismatched_ahead(self, number: int, groups: set[int]) -> list[tuple[list[int], bool]]:
        """This rank's batches of `groups` under other prompts; it repeats an item that does not count without one."""
        found: list[tuple[list[int], bool]] = []
        for step in self._mismatched_updates[number]:
            if self.mismatched is not None and any(step):
                own = [item for item in step[self.rank] if int(self.mismatched.group_of[item]) in groups]
                found.append((own, True) if own else (next(filter(None, step))[:1], False))
        return found
