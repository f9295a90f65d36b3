"""Prompts with their answers as one flat row of tokens for the policy: no padding, every prompt once."""

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_pl.models.packed_layout import Layout, Lengths, to_device


@dataclass(frozen=True)
class PrefixGroup:
    """A prompt with one or more answers, which see the prompt and not each other."""

    prompt: Sequence[int]
    answers: tuple[Sequence[int], ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers))


def common_tokens(rows: Sequence[list[int]]) -> int:
    """With how many tokens all rows begin alike; one less than the shortest has at most."""
    first, last = min(rows), max(rows)  # what the first and the last in order have in common, all have
    most = min(map(len, rows)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def share_beginning(rows: Sequence[list[int]], common: int | None = None) -> PrefixGroup:
    """Rows as what they have in common (`common_tokens`, if it is known) with the rest of each."""
    common = common_tokens(rows) if common is None else common
    return PrefixGroup(rows[0][:common], tuple(row[common:] for row in rows))


@dataclass
class PackedBatch:
    """N tokens of trees, one after the other, and the M tokens among them whose log-probs are wanted, answer by answer.

    Args:
        input_ids: Of each tree its prompt, then its answers, shape (1, N), int64.
        position_ids: Counted from the start of the prompt in every answer, shape (1, N), int64.
        logit_positions: Place among the N of the token that each wanted one follows, shape (M,), int64.
        targets: The wanted tokens' ids, shape (M,), int64.
        response_ids: Number of the answer that each of them is in, ascending, shape (M,), int64.
        counts: Wanted tokens of each answer, shape (answers,), int64.
        layout: Where prompts and answers lie.
    """

    input_ids: Tensor
    position_ids: Tensor
    logit_positions: Tensor
    targets: Tensor
    response_ids: Tensor
    counts: Tensor
    layout: Layout

    @property
    def lengths(self) -> Lengths:
        """Of each tree the tokens of its prompt and of every answer."""
        return self.layout.lengths

    @property
    def answers(self) -> int:
        """How many there are."""
        return sum(len(tree) - 1 for tree in self.lengths)

    def sum_per_response(self, logps: Tensor) -> Tensor:
        """The sum over each answer of something that is there for each of the M tokens, shape (answers,).

        On the device of `logps`: elsewhere the order of summation is another.
        """
        counts = to_device(self.counts, logps.device)
        return torch.segment_reduce(logps, "sum", lengths=counts, unsafe=True, initial=0)

    def inputs(self) -> dict[str, Any]:
        """The arguments of `PolicyLM.forward`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "counts"}

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The batch on `device`."""
        tensors = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "layout")
        return replace(self, **{n: to_device(v, device) for n, v in tensors}, layout=self.layout.to(device))


def pack(trees: Sequence[PrefixGroup]) -> PackedBatch:
    """Trees as a batch; every token of every answer is wanted."""
    ids: list[Tensor] = []
    positions, logit_positions, counts = [], [], []
    start = 0
    for tree in trees:
        prompt = len(tree.prompt)
        ids.append(torch.tensor(tree.prompt, dtype=torch.long))
        positions.append(torch.arange(prompt))
        end = start + prompt
        for answer in tree.answers:
            ids.append(torch.tensor(answer, dtype=torch.long))
            positions.append(torch.arange(prompt, prompt + len(answer)))
            before = torch.arange(end - 1, end - 1 + len(answer))
            before[:1] = start + prompt - 1  # an answer follows the prompt, not the answer that lies before it
            logit_positions.append(before)
            counts.append(len(answer))
            end += len(answer)
        start = end
    answers = [a for tree in trees for a in tree.answers]
    return PackedBatch(
        torch.cat(ids)[None],
        torch.cat(positions)[None],
        torch.cat(logit_positions),
        torch.cat([torch.tensor(a, dtype=torch.long) for a in answers]),
        torch.repeat_interleave(torch.arange(len(answers)), torch.tensor(counts)),
        torch.tensor(counts),
        Layout(tuple((len(tree.prompt), *map(len, tree.answers)) for tree in trees)),
    )


def padded(input_ids: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor]:
    """A batch's answers as rows of prompt and answer, padded on the right, for models that can't share prompts.

    Args:
        input_ids: Of a `PackedBatch`, shape (1, N).
        lengths: Of the same.

    Returns:
        Token ids and attention mask, each of shape (answers, longest prompt and answer). Token `i` of the M is
        predicted at row `response_ids[i]`, column `position_ids[0, logit_positions[i]]`.
    """
    ids, device = input_ids[0], input_ids.device
    rows: list[Tensor] = []
    start = 0
    for prompt, *answers in lengths:
        end = start + prompt
        for length in answers:
            rows.append(torch.cat([ids[start : start + prompt], ids[end : end + length]]))
            end += length
        start = end
    sizes = torch.tensor([len(row) for row in rows], device=device)
    table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return table, (torch.arange(table.shape[1], device=device) < sizes[:, None]).long()


def batches_by_length(rows: Sequence[Sized], tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices of rows of like length, longest first, padded tokens within the budget (one row at least)."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    start = 0
    while start < len(order):
        count = max(1, tokens_per_batch // len(rows[order[start]]))
        yield order[start : start + count]
        start += count
