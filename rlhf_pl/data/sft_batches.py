"""Rows of tokenized conversations, in batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from rlhf_pl.data.packing import Example, pack_examples
from rlhf_pl.models.packed_batch import PackedBatch


class SFTBatch:
    """R rows of examples.

    Args:
        rows: The packed examples of all rows.
        weight: Factor on the mean loss that makes an update's gradient the mean over its target tokens.
    """

    def __init__(self, rows: PackedBatch, weight: float = 1.0) -> None:
        self.rows, self.weight = rows, weight

    def to(self, device: torch.device | str, **kwargs: Any) -> "SFTBatch":
        """The batch on `device`; Lightning calls it."""
        return SFTBatch(self.rows.to(device), self.weight)


class SFTDataset(Dataset):
    """Rows of examples.

    Args:
        examples: Tokenized conversations.
        rows: Indices of the examples in each row.
    """

    def __init__(self, examples: Sequence[Example], rows: Sequence[Sequence[int]]) -> None:
        self.examples, self.rows = examples, rows

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        return [sum(len(self.examples[i]) for i in row) for row in self.rows]

    def target_counts(self) -> list[int]:
        """Number of target tokens of each row."""
        return [sum(sum(self.examples[i].mask[1:]) for i in row) for row in self.rows]

    def __getitems__(self, request: tuple[list[int], tuple[float]]) -> SFTBatch:
        indices, (weight,) = request
        return SFTBatch(pack_examples([self.examples[i] for row in indices for i in self.rows[row]]), weight)
