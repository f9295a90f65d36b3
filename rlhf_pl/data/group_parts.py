"""Splits prompt groups that are larger than a token budget into parts, each with a copy of the prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from rlhf_pl.data.stored_groups import StoredGroups
from rlhf_pl.data.update_plan import fill_greedily
from rlhf_pl.models.packed_layout import to_device
from rlhf_pl.utils.errors import InputError


@dataclass(frozen=True)
class GroupParts:
    """What micro-batches are made of: the items, which are prompt groups or parts of one.

    Args:
        items: The I items as groups. Whole groups and first parts have the index of their group; other parts follow.
        group_of: Index of each item's group, shape (I,), int64.
        firsts: Position of each item's first response among those of its group, shape (I,), int64.
        split: The items of each group that is split, in the order of their responses.
    """

    items: StoredGroups
    group_of: np.ndarray
    firsts: np.ndarray
    split: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def is_part(self, item: int) -> bool:
        """Whether an item is a part of a group that is split."""
        return int(self.group_of[item]) in self.split

    def groups(self, items: Sequence[int]) -> list[int]:
        """Indices of the groups of some items, each group once."""
        return list(dict.fromkeys(self.group_of[list(items)].tolist()))


def split_groups(groups: StoredGroups, max_tokens: int | None) -> GroupParts:
    """Split groups into parts of at most `max_tokens` tokens, each with consecutive responses and the prompt.

    A response that is longer than that with its prompt is a part of its own, over the limit.

    Args:
        groups: G groups.
        max_tokens: The limit; None for no limit.
    """
    whole = GroupParts(groups, np.arange(len(groups)), np.zeros(len(groups), np.int64))
    if max_tokens is None:
        return whole
    totals, responses = groups.lengths(), groups.response_lengths()
    spans: dict[int, list[list[int]]] = {}  # positions of the responses of each part
    for group in np.flatnonzero((np.array(totals) > max_tokens) & (groups.sizes > 1)).tolist():
        lengths = responses[groups.rows(group)].tolist()
        room = max_tokens - (totals[group] - sum(lengths))
        spans[group] = fill_greedily(range(len(lengths)), lengths, room)
    if not spans:
        return whole
    parts = [(g, spans[g][0] if g in spans else list(range(int(groups.sizes[g])))) for g in range(len(groups))]
    split: dict[int, list[int]] = {}
    for group, positions in spans.items():
        split[group] = [group, *range(len(parts), len(parts) + len(positions) - 1)]
        parts += [(group, part) for part in positions[1:]]
    members = np.concatenate([groups.rows(group)[positions] for group, positions in parts])
    sizes = np.array([len(positions) for _, positions in parts])
    items = replace(groups, sizes=sizes, members=members, pairs=None)
    firsts = np.array([positions[0] for _, positions in parts])
    return GroupParts(items, np.array([group for group, _ in parts]), firsts, split)


@dataclass(frozen=True)
class BatchParts:
    """Which tokens of its prompt groups a batch computes, item by item.

    Args:
        groups: Index of each item's group in the round.
        spans: Of each item, the number of its group's response tokens before its own, and the number of its own.
        is_part: Whether each item is a part of a group that is split.
        lengths: Tokens of each response of the items' whole groups, shape (R,), int64.
    """

    groups: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    is_part: tuple[bool, ...]
    lengths: Tensor

    def to(self, device: torch.device | str) -> "BatchParts":
        """The same on `device`."""
        return replace(self, lengths=to_device(self.lengths, device))

    @property
    def counted(self) -> list[int]:
        """Places of the items that a group is counted by: whole groups and first parts."""
        return [place for place, (before, _) in enumerate(self.spans) if before == 0]

    def by_part(self, values: Tensor) -> dict[tuple[int, int], Tensor]:
        """Values of the computed tokens, shape (M,), by group and number of tokens before; of parts alone."""
        items = zip(self.groups, self.spans, self.is_part, self._split(values), strict=True)
        return {(group, span[0]): own for group, span, is_part, own in items if is_part}

    def complete(self, values: Tensor, known: Mapping[int, Tensor]) -> Tensor:
        """Values of all tokens of the items' whole groups.

        Args:
            values: Those of the computed tokens, shape (M,).
            known: Those of all tokens of each group that is split, by its index.

        Raises:
            InputError: A group is missing in `known`.
        """
        pieces: list[Tensor] = []
        if missing := {group for group, is_part in zip(self.groups, self.is_part, strict=True) if is_part} - set(known):
            raise InputError(
                f"The batch has parts of {len(missing)} prompt groups above `data.max_tokens_per_batch`, without the "
                "log-probs of the others: a `training_step` of your own must call `RebelModule._groups(batch)`, or set "
                "`computes_ahead = False` on its class, so that groups are not split."
            )
        for group, (before, count), is_part, own in zip(
            self.groups, self.spans, self.is_part, self._split(values), strict=True
        ):
            pieces += [known[group][:before], own, known[group][before + count :]] if is_part else [own]
        return torch.cat(pieces)

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.split([count for _, count in self.spans])


def batch_parts(parts: GroupParts, groups: StoredGroups, items: Sequence[int]) -> BatchParts:
    """Describe a batch of `items`, which are parts of `groups` or whole ones."""
    own, spans, lengths = parts.group_of[list(items)].tolist(), [], groups.response_lengths()
    of_groups = [lengths[groups.rows(group)] for group in own]
    for item, of_group in zip(items, of_groups, strict=True):
        first = int(parts.firsts[item])
        last = first + int(parts.items.sizes[item])
        spans.append((int(of_group[:first].sum()), int(of_group[first:last].sum())))
    is_part = tuple(parts.is_part(item) for item in items)
    return BatchParts(tuple(own), tuple(spans), is_part, torch.from_numpy(np.concatenate(of_groups).astype(np.int64)))
