"""Several examples in a row, without seeing each other."""

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
        mask: True at the tokens that are learned.
    """

    ids: Sequence[int]
    mask: Sequence[bool]

    def __len__(self) -> int:
        return len(self.ids)


def fill_rows(order: Sequence[int], lengths: Sequence[int], max_tokens: int, window: int = 64) -> list[list[int]]:
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


def pack_examples(examples: Sequence[Example]) -> PackedBatch:
    """Examples, which do not see each other, with their learned tokens as the wanted ones.

    An example's first token is never learned: nothing precedes it.
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
