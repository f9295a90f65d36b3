"""Prompts and their responses packed into one flat row of tokens: no padding, each prompt once."""

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_pl.models.packed_layout import Layout, Lengths, to_device


@dataclass(frozen=True)
class PrefixGroup:
    """The tokens of a prompt with one or more responses, which attend to the prompt but not to each other."""

    prompt: Sequence[int]
    responses: tuple[Sequence[int], ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


def common_prefix_length(rows: Sequence[list[int]]) -> int:
    """Length of the longest common prefix of all rows that leaves each row at least one token."""
    first, last = min(rows), max(rows)  # in sorted order, the first and last row share what all share
    limit = min(map(len, rows)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def make_prefix_group(rows: Sequence[list[int]], common: int | None = None) -> PrefixGroup:
    """Split rows into their common prefix, of length `common` if it is known, and the rest of each row."""
    common = common_prefix_length(rows) if common is None else common
    return PrefixGroup(rows[0][:common], tuple(row[common:] for row in rows))


@dataclass
class PackedBatch:
    """N tokens of consecutive prefix groups, and M target tokens among them whose log-probs are computed.

    Args:
        input_ids: Each prefix group's prompt, then its responses, shape (1, N), int64.
        position_ids: Positions counted from the start of the prompt, in every response, shape (1, N), int64.
        logit_positions: Index among the N tokens of the token before each target, shape (M,), int64.
        targets: Ids of the target tokens, in the order of the responses, shape (M,), int64.
        response_ids: Index of each target's response, ascending, shape (M,), int64.
        counts: Number of targets of each response, shape (responses,), int64.
        layout: Lengths of the prompts and responses.
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
        """For each prefix group, the number of tokens of its prompt and of each response."""
        return self.layout.lengths

    @property
    def num_responses(self) -> int:
        """Number of responses."""
        return sum(len(group) - 1 for group in self.lengths)

    def sum_per_response(self, logps: Tensor) -> Tensor:
        """Sum a value of each target token over each response, shape (responses,).

        Runs on the device of `logps`: the order of summation depends on the device.
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


def pack(groups: Sequence[PrefixGroup]) -> PackedBatch:
    """Pack prefix groups into a batch; every token of every response is a target."""
    ids: list[Tensor] = []
    positions, logit_positions, counts = [], [], []
    start = 0
    for group in groups:
        prompt = len(group.prompt)
        ids.append(torch.tensor(group.prompt, dtype=torch.long))
        positions.append(torch.arange(prompt))
        end = start + prompt
        for response in group.responses:
            ids.append(torch.tensor(response, dtype=torch.long))
            positions.append(torch.arange(prompt, prompt + len(response)))
            before = torch.arange(end - 1, end - 1 + len(response))
            before[:1] = start + prompt - 1  # a response follows the prompt, not the response before it
            logit_positions.append(before)
            counts.append(len(response))
            end += len(response)
        start = end
    responses = [response for group in groups for response in group.responses]
    return PackedBatch(
        torch.cat(ids)[None],
        torch.cat(positions)[None],
        torch.cat(logit_positions),
        torch.cat([torch.tensor(r, dtype=torch.long) for r in responses]),
        torch.repeat_interleave(torch.arange(len(responses)), torch.tensor(counts)),
        torch.tensor(counts),
        Layout(tuple((len(group.prompt), *map(len, group.responses)) for group in groups)),
    )


def unpack(input_ids: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor]:
    """Unpack a batch into right-padded rows of prompt and response, for models that can't share prompts.

    Args:
        input_ids: `input_ids` of a `PackedBatch`, shape (1, N).
        lengths: `lengths` of the same batch.

    Returns:
        Token ids and attention mask, each of shape (responses, longest prompt and response). Target `i` is predicted
        at row `response_ids[i]`, column `position_ids[0, logit_positions[i]]`.
    """
    ids, device = input_ids[0], input_ids.device
    rows: list[Tensor] = []
    start = 0
    for prompt, *responses in lengths:
        end = start + prompt
        for length in responses:
            rows.append(torch.cat([ids[start : start + prompt], ids[end : end + length]]))
            end += length
        start = end
    sizes = torch.tensor([len(row) for row in rows], device=device)
    table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return table, (torch.arange(table.shape[1], device=device) < sizes[:, None]).long()


def batches_by_length(rows: Sequence[Sized], tokens_per_batch: int) -> Iterator[list[int]]:
    """Batches of indices of rows of similar length, longest first; each within the budget of padded tokens.

    A batch has at least one row.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    start = 0
    while start < len(order):
        count = max(1, tokens_per_batch // len(rows[order[start]]))
        yield order[start : start + count]
        start += count
