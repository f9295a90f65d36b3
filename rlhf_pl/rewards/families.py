"""Answers to one prompt, rendered for a reward model, as a tree: what they have in common is computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_pl.models.packed_batch import PrefixGroup, make_prefix_group
from rlhf_pl.models.rendering import Rendered
from rlhf_pl.models.rotary import shared_prefix_length
from rlhf_pl.rewards.base import Sample


@dataclass(frozen=True)
class Family:
    """Answers to one prompt: as rows, and as what they have in common with the rest of each, one token at least."""

    rows: list[Rendered]
    tree: PrefixGroup

    def __len__(self) -> int:
        return len(self.tree)


def families(samples: Sequence[Sample], rows: Sequence[Rendered], config: Any) -> list[Family]:
    """Neighbours that answer the same prompt, of the model that `config` describes."""
    groups: list[list[Rendered]] = []
    before: Sample | None = None
    for sample, row in zip(samples, rows, strict=True):
        if before is None or (sample.messages, sample.tools) != (before.messages, before.tools):
            groups.append([])
        groups[-1].append(row)
        before = sample
    return [Family(group, _tree([row.ids for row in group], config)) for group in groups]


def _tree(rows: list[list[int]], config: Any) -> PrefixGroup:
    return make_prefix_group(rows, shared_prefix_length(rows, config))
