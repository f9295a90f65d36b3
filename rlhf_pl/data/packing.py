"""Packs several tokenized conversations into a row; they do not attend to each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf_pl.models.packed_batch import PackedBatch
from rlhf_pl.models.packed_layout import Layout


@dataclass(frozen=True)
class Example:
    """A tokenized conversation.

    Args:
        ids: Token ids.
        mask: True at the tokens that the loss is computed on.
    """

    ids: Sequence[int]
    mask: Sequence[bool]

    def __len__(self) -> int:
        return len(self.ids)


def fill_rows(order: Sequence[int], lengths: Sequence[int], max_tokens: int, window: int = 64) -> list[list[int]]:
    """Assign examples to rows of at most `max_tokens`, by first fit among the last `window` rows.

    Args:
        order: Indices of the examples, in the order of assignment.
        lengths: Number of tokens of each example by index, at most `max_tokens`.
        max_tokens: Maximum tokens of a row.
        window: Number of rows that are tried; earlier rows are closed.
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


def pack_examples(examples: Sequence[Example]) -> PackedBatch:
    """Pack examples, which do not attend to each other; the targets are the tokens under the masks.

    The first token of an example is never a target: no token precedes it.
    """
    masks = [torch.tensor([False, *e.mask[1:]]) for e in examples]
    sizes = torch.tensor([len(e) for e in examples])
    targets = torch.cat(masks).nonzero()[:, 0]
    ids = torch.cat([torch.tensor(e.ids) for e in examples])
    response_ids = torch.repeat_interleave(torch.arange(len(examples)), sizes)[targets]
    return PackedBatch(
        ids[None],
        torch.cat([torch.arange(len(e)) for e in examples])[None],
        targets - 1,
        ids[targets],
        response_ids,
        torch.bincount(response_ids, minlength=len(examples)),
        Layout(tuple((0, len(e)) for e in examples)),
    )
