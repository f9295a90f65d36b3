"""Responses to one prompt, rendered for a reward model, as a prefix group: their common prefix is computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_pl.models.packed_batch import PrefixGroup, make_prefix_group
from rlhf_pl.models.rendering import Rendered
from rlhf_pl.models.rotary import shared_prefix_length
from rlhf_pl.rewards.base import Sample


@dataclass(frozen=True)
class ResponseGroup:
    """Responses to one prompt, as rendered rows and as a prefix group."""

    rows: list[Rendered]
    prefix_group: PrefixGroup

    def __len__(self) -> int:
        return len(self.prefix_group)


def group_responses(samples: Sequence[Sample], rows: Sequence[Rendered], config: Any) -> list[ResponseGroup]:
    """Group consecutive samples with the same prompt.

    Args:
        samples: The samples.
        rows: Their rendered conversations.
        config: The config of the reward model.
    """
    groups: list[list[Rendered]] = []
    previous: Sample | None = None
    for sample, row in zip(samples, rows, strict=True):
        if previous is None or (sample.messages, sample.tools) != (previous.messages, previous.tools):
            groups.append([])
        groups[-1].append(row)
        previous = sample
    return [_make_response_group(group, config) for group in groups]


def _make_response_group(rows: list[Rendered], config: Any) -> ResponseGroup:
    token_ids = [row.ids for row in rows]
    return ResponseGroup(rows, make_prefix_group(token_ids, shared_prefix_length(token_ids, config)))
