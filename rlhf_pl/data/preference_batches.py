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
from rlhf_pl.data.tokenizing import Recipe, iterate_token_lists, make_token_table
from rlhf_pl.models.packed_batch import make_prefix_group
from rlhf_pl.models.packed_layout import Layout, to_device
from rlhf_pl.models.rendering import Rendered, Renderer, pad_rows
from rlhf_pl.models.rotary import shared_prefix_length
from rlhf_pl.models.sequence_classifier import prefix_group_inputs


class PreferenceBatch:
    """B comparisons.

    Args:
        inputs: Arguments of `ClassifierLM` for 2B scores: for each comparison the chosen response, then the rejected.
        labels: Probability that the chosen response is better, shape (B,), float32.
        margins: Minimum difference of the scores, shape (B,), float32, reward units.
        longer: 1 if the text of the chosen response is longer, 0.5 for equal lengths, else 0; shape (B,), float32.
        weight: Factor on the mean loss that makes an update's gradient the mean over its pairs.
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
        render: Renderer of the reward model.
        config: Config of the reward model.
        chat_template_kwargs: Further variables of the chat template.
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
        self.rows = _render_pairs(pairs, render, chat_template_kwargs, option)
        self.pad_id, self.shares_prompts = 0, False
        self.truncated = sum(row.truncated_tokens > 0 for both in self.rows for row in both)

    def __len__(self) -> int:
        return len(self.pairs)

    def lengths(self) -> list[int]:
        """Number of tokens of each pair: the common prefix counted once, or both rows padded to the longer one."""
        if self.shares_prompts:
            return [sum(map(len, both)) - common for both, common in zip(self.rows, self._prefix_lengths, strict=True)]
        return [2 * max(map(len, both)) for both in self.rows]

    @cached_property
    def _prefix_lengths(self) -> list[int]:
        """Length of the common prefix of the two rows of each pair, in tokens."""
        return [shared_prefix_length([row.ids for row in both], self.config) for both in self.rows]

    def _inputs(self, indices: Sequence[int]) -> dict[str, Any]:
        if self.shares_prompts:
            groups = [make_prefix_group([row.ids for row in self.rows[i]], self._prefix_lengths[i]) for i in indices]
            return prefix_group_inputs(groups)
        return pad_rows([row for i in indices for row in self.rows[i]], self.pad_id)

    def __getitems__(self, request: tuple[list[int], tuple[float]]) -> PreferenceBatch:
        indices, (weight,) = request
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


def _render_pairs(
    pairs: Sequence[Preference], render: Renderer, kwargs: Mapping[str, Any] | None, option: str
) -> list[list[Rendered]]:
    """Render and tokenize both conversations of each pair."""

    def encode(pair: Preference) -> list[Sequence[int]]:
        columns: list[Sequence[int]] = []
        for response in pair.responses:
            row = render(pair.messages, response, pair.tools, kwargs, True)
            facts = [_NO_TURN if row.turn is None else row.turn, row.truncated_tokens]
            columns += [row.ids, facts, row.token_type_ids]
        return columns

    names = [f"{which}_{what}" for which in ("chosen", "rejected") for what in ("ids", "facts", "types")]
    # to truncate a pair of texts, a setting of the tokenizer is changed, which threads would share
    recipe = Recipe(render.tokenizer, [render.settings, kwargs], option, threads=not render.pair_encoding)
    table = make_token_table(pairs, encode, names, recipe, lambda pair: [pair.messages, pair.responses, pair.tools])
    return [
        [unpack_row(*columns[:3]), unpack_row(*columns[3:])]
        for columns in zip(*(iterate_token_lists(table, n) for n in names), strict=True)
    ]


def unpack_row(ids: np.ndarray, facts: np.ndarray, types: np.ndarray) -> Rendered:
    """A rendered conversation from its columns in a token table."""
    turn, truncated = facts.tolist()
    return Rendered(ids.tolist(), None if turn == _NO_TURN else turn, truncated, tuple(types.tolist()))
