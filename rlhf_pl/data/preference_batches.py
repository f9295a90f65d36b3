"""Comparisons as token ids, in batches."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rlhf_pl.algorithms.agreement import longer_text
from rlhf_pl.data.preferences import Preference
from rlhf_pl.data.tokenizing import Recipe, token_lists, token_table
from rlhf_pl.models.packed_batch import make_prefix_group
from rlhf_pl.models.packed_layout import Layout, to_device
from rlhf_pl.models.rendering import Rendered, Renderer, padded
from rlhf_pl.models.rotary import shared_prefix_length
from rlhf_pl.models.sequence_classifier import prefix_group_inputs


class PreferenceBatch:
    """B comparisons.

    Args:
        inputs: What `ClassifierLM` takes for 2B scores: of each comparison that of the chosen, then of the rejected.
        labels: Probability that the chosen answer is better, shape (B,), float32.
        margins: By how much its score should be higher, shape (B,), float32, reward units.
        longer: Whether the chosen answer is the longer text: 1, 0.5 for equal lengths, 0; shape (B,), float32.
        weight: Factor on the mean loss, so that an update's gradient is the mean over its pairs.
    """

    def __init__(
        self, inputs: dict[str, Any], labels: Tensor, margins: Tensor, longer: Tensor, weight: float = 1.0
    ) -> None:
        self.inputs, self.labels, self.margins, self.longer, self.weight = inputs, labels, margins, longer, weight

    def to(self, device: torch.device | str, **kwargs: Any) -> "PreferenceBatch":
        """The batch on `device`; Lightning calls it."""
        inputs = {n: to_device(v, device) if isinstance(v, Tensor) else v for n, v in self.inputs.items()}
        if isinstance(layout := inputs.get("layout"), Layout):
            inputs["layout"] = layout.to(device)
        labels, margins, longer = (to_device(t, device) for t in (self.labels, self.margins, self.longer))
        return PreferenceBatch(inputs, labels, margins, longer, self.weight)


class PreferenceDataset(Dataset):
    """Comparisons as token ids.

    Args:
        pairs: The comparisons.
        render: The reward model's.
        config: The reward model's.
        chat_template_kwargs: Further variables of its chat template.
        option: The option that names the source, for errors.
    """

    def __init__(
        self,
        pairs: Sequence[Preference],
        render: Renderer,
        config: Any,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        option: str = "data.preferences",
    ) -> None:
        self.pairs, self.config = pairs, config
        self.rows = _rendered(pairs, render, chat_template_kwargs, option)
        self.pad_id, self.shares_prompts = 0, False
        self.truncated = sum(row.truncated_tokens > 0 for both in self.rows for row in both)

    def __len__(self) -> int:
        return len(self.pairs)

    def lengths(self) -> list[int]:
        """Tokens of each pair: without what both have in common a second time, or both rows as long as the longer."""
        if self.shares_prompts:
            return [sum(map(len, both)) - common for both, common in zip(self.rows, self._common, strict=True)]
        return [2 * max(map(len, both)) for both in self.rows]

    @cached_property
    def _common(self) -> list[int]:
        """With how many tokens the two rows of each pair begin alike."""
        return [shared_prefix_length([row.ids for row in both], self.config) for both in self.rows]

    def _inputs(self, indices: Sequence[int]) -> dict[str, Any]:
        if self.shares_prompts:
            trees = [make_prefix_group([row.ids for row in self.rows[i]], self._common[i]) for i in indices]
            return prefix_group_inputs(trees)
        return padded([row for i in indices for row in self.rows[i]], self.pad_id)

    def __getitems__(self, request: tuple[list[int], float]) -> PreferenceBatch:
        indices, weight = request
        pairs = [self.pairs[i] for i in indices]
        longer = [longer_text(p.chosen, p.rejected) for p in pairs]
        return PreferenceBatch(
            self._inputs(indices),
            torch.tensor([p.label for p in pairs]),
            torch.tensor([p.margin for p in pairs]),
            torch.tensor(longer),
            weight,
        )


_NO_TURN = -1


def _rendered(
    pairs: Sequence[Preference], render: Renderer, kwargs: Mapping[str, Any] | None, option: str
) -> list[list[Rendered]]:
    """Both conversations of each pair."""

    def encode(pair: Preference) -> list[Sequence[int]]:
        columns: list[Sequence[int]] = []
        for response in pair.responses:
            row = render(pair.messages, response, pair.tools, kwargs, True)
            facts = [_NO_TURN if row.turn is None else row.turn, row.truncated_tokens]
            columns += [row.ids, facts, row.token_type_ids]
        return columns

    names = [f"{which}_{what}" for which in ("chosen", "rejected") for what in ("ids", "facts", "types")]
    # a pair of texts is cut by a setting of the tokenizer's, which threads would share
    recipe = Recipe(render.tokenizer, [render.settings, kwargs], option, threads=not render.pair_encoding)
    table = token_table(pairs, encode, names, recipe, lambda pair: [pair.messages, pair.responses, pair.tools])
    return [
        [_row(*columns[:3]), _row(*columns[3:])]
        for columns in zip(*(token_lists(table, n) for n in names), strict=True)
    ]


def _row(ids: np.ndarray, facts: np.ndarray, types: np.ndarray) -> Rendered:
    turn, truncated = facts.tolist()
    return Rendered(ids.tolist(), None if turn == _NO_TURN else turn, truncated, tuple(types.tolist()))
