"""Base class of the DataModules of pairs and prompt groups: it divides an epoch into updates, by pairs or by tokens."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning as L

from rlhf_pl.algorithms.prompt_groups import Z_REF
from rlhf_pl.data.base_datamodule import RowsDataModule
from rlhf_pl.data.group_batches import GroupDataset
from rlhf_pl.data.group_parts import GroupParts, split_groups
from rlhf_pl.data.group_sampler import GroupSampler
from rlhf_pl.data.micro_batches import MicroBatchSampler
from rlhf_pl.data.mismatched import mismatch_prompts
from rlhf_pl.data.round_source import RoundSource
from rlhf_pl.data.stored_groups import StoredGroups
from rlhf_pl.data.update_plan import UpdatePlan
from rlhf_pl.utils.errors import check_at_least


class PairsDataModule(RowsDataModule):
    """Pairs, in updates of `batch_size` x `accumulate_grad_batches` x devices pairs.

    For a loss on prompt groups, read "prompt group" for "pair".

    Args:
        max_tokens_per_batch: Maximum tokens of a micro-batch; only a single pair, or a prompt with a single response,
            may be longer. An update keeps its pairs and is divided into as many micro-batches as needed. None for
            `batch_size` pairs per micro-batch.
        updates_per_round: Number of updates of an epoch; None for one pass, or as many as `passes` says.
        rows: The arguments of `RowsDataModule`; `batch_size` counts pairs.
    """

    passes = 1  # over the pairs of an epoch

    def __init__(self, max_tokens_per_batch: int | None, updates_per_round: int | None = None, **rows: Any) -> None:
        super().__init__(**rows)
        check_at_least("data", max_tokens_per_batch=(max_tokens_per_batch, 1), updates_per_round=(updates_per_round, 1))
        self.max_tokens_per_batch, self.updates_per_round = max_tokens_per_batch, updates_per_round
        self._accumulate: int | None = None
        self._source: RoundSource | None = None

    def prepare_with(self, source: RoundSource) -> None:
        """Use `source` to prepare each round before it is read."""
        self._source = source

    def pairs_per_update(self, trainer: L.Trainer) -> int:
        """Number of pairs in an update."""
        if self._accumulate is None:  # the configured value: `accumulate_over` changes the Trainer's
            self._accumulate = trainer.accumulate_grad_batches
        return self.batch_size * self._accumulate * trainer.num_devices * trainer.num_nodes

    @property
    def _accumulation(self) -> int:
        return self._trainer.accumulate_grad_batches if self._accumulate is None else self._accumulate

    @property
    def has_varying_updates(self) -> bool:
        """Whether the number of micro-batches of an update depends on the epoch's pairs."""
        return self.max_tokens_per_batch is not None or self.passes > 1 or self.updates_per_round is not None

    def passes_over(self, pairs: int) -> float:
        """How many times, on average, an epoch uses each of its pairs or groups."""
        return self._plan(pairs, self.passes).used_pairs / max(1, pairs)

    @abstractmethod
    def divide(self, epoch: int) -> MicroBatchSampler:
        """Divide an epoch into updates and micro-batches."""

    def _divide(self, order: str, pairs: int, lengths: Sequence[int]) -> MicroBatchSampler:
        return MicroBatchSampler(self._plan(pairs), order, self._trainer.global_rank, lengths)

    def _plan(self, pairs: int, passes: int = 1) -> UpdatePlan:
        trainer, world_size = self._trainer, self._trainer.world_size
        accumulate = self.pairs_per_update(trainer) // self.batch_size // world_size
        return UpdatePlan(
            passes * pairs,
            self.batch_size,
            accumulate,
            world_size,
            self.max_tokens_per_batch,
            passes,
            self.updates_per_round,
        )

    def _divide_groups(
        self,
        order: str,
        groups: StoredGroups,
        by_length: bool,
        passes: int = 1,
        sizes: Sequence[Sequence[int] | None] = (None,),
    ) -> GroupSampler:
        """The same for prompt groups; those above the token budget are split."""
        parts, mismatched = self._split(groups)
        return GroupSampler(
            self._plan(len(groups), passes), order, self._trainer.global_rank, parts, by_length, sizes, mismatched
        )

    def _split(self, groups: StoredGroups) -> tuple[GroupParts, GroupParts | None]:
        """Groups within the token budget; and those under other prompts, if the loss needs them and there are any."""
        module: Any = self._trainer.lightning_module
        can_split = getattr(module, "computes_ahead", False)  # a user's module may not
        mismatched = mismatch_prompts(groups) if Z_REF in module.needs else None
        return (
            split_groups(groups, self.max_tokens_per_batch if can_split else None),
            None if mismatched is None else split_groups(mismatched, self.max_tokens_per_batch),
        )

    def accumulate_over(self, batches: MicroBatchSampler) -> MicroBatchSampler:
        """Set the Trainer's accumulation to the micro-batches of an update. No other code sets it.

        `teardown` restores the configured value.
        """
        self.pairs_per_update(self._trainer)
        self._trainer.accumulate_grad_batches = batches.accumulate
        return batches

    def teardown(self, stage: str) -> None:
        if self._accumulate is not None:
            self._trainer.accumulate_grad_batches, self._accumulate = self._accumulate, None

    def _held_out_batches(self, pairs: int, lengths: Sequence[int] | None = None) -> MicroBatchSampler:
        """Micro-batches of held-out pairs, in an order that all epochs share."""
        plan = UpdatePlan(pairs, self.batch_size, 1, self._trainer.world_size)
        return MicroBatchSampler(plan, "held-out", self._trainer.global_rank, lengths)

    def _held_out_groups(self, dataset: GroupDataset, pairs: int, by_length: bool) -> MicroBatchSampler:
        """Micro-batches of held-out groups; where something is computed ahead, all of them are one update."""
        dataset.parts, dataset.mismatched = parts, mismatched = self._split(dataset.stored)
        if not parts.split and mismatched is None:
            return self._held_out_batches(pairs, dataset.lengths() if by_length else None)
        world_size = self._trainer.world_size
        accumulate = -(-pairs // (self.batch_size * world_size))
        max_tokens = self.max_tokens_per_batch if parts.split else None
        plan = UpdatePlan(pairs, self.batch_size, accumulate, world_size, max_tokens)
        rank, by_length = self._trainer.global_rank, by_length or max_tokens is not None
        return GroupSampler(plan, "held-out", rank, parts, by_length, mismatched=mismatched)
