"""Samples that a reward may change without anybody else noticing."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf_pl.rewards.base import Sample

_PLAIN = frozenset({str, int, float, bool, type(None), bytes})


def own_copies(batch: Sequence[Sample]) -> list[Sample]:
    """The samples with messages, columns and tools of their own; what can't be changed is shared."""
    return [
        replace(
            sample,
            messages=_copied(sample.messages),
            response_tokens=sample.response_tokens[:],
            columns=_copied_mapping(sample.columns),
            message=_copied(sample.message),
            tools=_copied(sample.tools),
            chat_template_kwargs=_copied_mapping(sample.chat_template_kwargs),
        )
        for sample in batch
    ]


def _copied(value: Any) -> Any:
    """A deep copy, ten times as fast as `copy.deepcopy` for what JSON and Parquet files hold."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        return [_copied(v) for v in value]
    if kind is dict:
        return {k: _copied(v) for k, v in value.items()}
    return copy.deepcopy(value)


def _copied_mapping(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copied(value) for name, value in values.items()}
