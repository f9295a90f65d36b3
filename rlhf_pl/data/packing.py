"""Several examples in a row, without seeing each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """A tokenized conversation.

    Args:
        ids: Token ids.
        mask: True at the tokens that are learned.
    """

    ids: Sequence[int]
    mask: Sequence[bool]

    def __len__(self) -> int:
        return len(self.ids)


def pack(order: Sequence[int], lengths: Sequence[int], max_tokens: int, window: int = 64) -> list[list[int]]:
    """Examples in rows of at most `max_tokens`: first fit among the last `window` open rows, in the order given.

    Args:
        order: Numbers of the examples.
        lengths: Tokens of each example, by its number; none above `max_tokens`.
        max_tokens: Longest row.
        window: Rows that are tried; older ones stay as they are.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in order:
        fits = (i for i in range(max(0, len(rows) - window), len(rows)) if room[i] >= lengths[index])
        row = next(fits, None)
        if row is None:
            rows.append([])
            room.append(max_tokens)
            row = len(rows) - 1
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def lay_out(rows: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
    """Rows of examples as the arguments of `PolicyLM.forward`.

    Returns:
        `input_ids`, `position_ids` (from 0 in every example, and in the padding), `response_mask` (what is learned;
        never an example's first token, which nothing precedes), each of shape (R, T).
    """
    width = max(sum(map(len, row)) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros_like(ids)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example)
            ids[i, start:end] = torch.tensor(example.ids)
            positions[i, start:end] = torch.arange(len(example))
            mask[i, start + 1 : end] = torch.tensor(example.mask[1:], dtype=torch.bool)
            start = end
        positions[i, start:] = torch.arange(width - start)
    return {"input_ids": ids, "position_ids": positions, "response_mask": mask}
