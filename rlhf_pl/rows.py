"""Rows of prompt and response, padded into batches for the policy."""

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One prompt with one response."""

    prompt: Sequence[int]
    response: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass
class RowBatch:
    """Padded rows, the arguments of `PolicyLM.forward`.

    Args:
        input_ids: Prompt, response, zeros, shape (R, T), int64.
        attention_mask: 1 at prompt and response, shape (R, T), int64.
        response_mask: 1 at the response, shape (R, T), bool.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor


def pad_rows(rows: Sequence[Row]) -> RowBatch:
    """`rows` padded on the right to the longest."""
    width = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    response_mask = torch.zeros(input_ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.as_tensor([*row.prompt, *row.response])
        attention_mask[i, : len(row)] = 1
        response_mask[i, len(row.prompt) : len(row)] = True
    return RowBatch(input_ids, attention_mask, response_mask)


def batches_by_length(rows: Sequence[Sized], tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices of rows of like length, longest first, padded tokens within the budget (one row at least)."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    start = 0
    while start < len(order):
        count = max(1, tokens_per_batch // len(rows[order[start]]))
        yield order[start : start + count]
        start += count
