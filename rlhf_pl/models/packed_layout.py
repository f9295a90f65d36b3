"""The layout of prompts and responses in a flat row of tokens, and the inputs of attention kernels for it."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Lengths = tuple[tuple[int, ...], ...]

_BLOCK = 128  # maximum lengths are rounded up to a multiple, so that kernels see few different sizes


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to `device`, without blocking the host."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Layout:
    """The lengths of consecutive prefix groups: each group's prompt, then its responses.

    Args:
        lengths: For each prefix group, the number of tokens of its prompt and of each response; at least one response.
        device: Device of the tensors derived from the lengths, which are cached.
    """

    def __init__(self, lengths: Lengths, device: torch.device | str = "cpu") -> None:
        self.lengths, self.device = lengths, torch.device(device)
        self._cache: dict[Any, Any] = {}

    def to(self, device: torch.device | str) -> "Layout":
        """The same layout for another device. Builds tensors for GPU kernels immediately, while the host is idle."""
        moved = Layout(self.lengths, device)
        if moved.device.type == "cuda":
            _ = moved.varlen
        return moved

    @cached_property
    def varlen(self) -> "Varlen":
        """Inputs of kernels for sequences of different lengths."""
        with torch.device("cpu"):  # Lightning may have set another default device
            return Varlen(self.lengths, self.device)

    @cached_property
    def token_indices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Prefix group index, response index (-1 in prompts) and position of each token, each of shape (N,), int32."""
        with torch.device("cpu"):
            return self._make_token_indices()

    def _make_token_indices(self) -> tuple[Tensor, Tensor, Tensor]:
        groups, responses, positions = [], [], []
        response = 0
        for number, (prompt, *others) in enumerate(self.lengths):
            groups.append(torch.full((prompt + sum(others),), number))
            responses.append(torch.full((prompt,), -1))
            positions.append(torch.arange(prompt))
            for length in others:
                responses.append(torch.full((length,), response))
                positions.append(torch.arange(prompt, prompt + length))
                response += 1
        return tuple(to_device(torch.cat(part).int(), self.device) for part in (groups, responses, positions))  # type: ignore[return-value]

    def mask_function(self, window: int | None) -> Callable[[Any, Any, Any, Any], Tensor]:
        """A mask function for FlexAttention: (batch, head, query, key) -> whether the query attends to the key."""
        group, response, position = self.token_indices

        def mask(batch: Any, head: Any, query: Any, key: Any) -> Tensor:
            inside = (group[query] == group[key]) & ((response[key] == -1) | (response[query] == response[key]))
            seen = inside & (position[key] <= position[query])
            return seen if window is None else seen & (position[query] - position[key] < window)

        return mask

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result of `make`, computed once for this layout."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


class Varlen:
    """Queries, keys and values as independent sequences.

    The first sequence of a prefix group is its prompt with the first response. Each further response is a sequence
    whose keys and values are the prompt's and its own.

    Args:
        lengths: See `Layout`.
        device: Device of the tensors.

    Attributes:
        keys: Index among the N tokens of each key of all consecutive sequences, shape (K,), int64.
        own: Index among the K keys of each of the N tokens in its own sequence, shape (N,), int64.
        copies: For the second, third, ... responses of all groups: indices of prompt tokens among the N, and of their
            copies among the K, each pair of shape (C,), int64. No index occurs twice in a pair.
        query_offsets: Start of each sequence's queries, and the end, shape (sequences + 1,), int32.
        key_offsets: The same for keys.
        max_query: Upper bound of the number of queries of a sequence.
        max_key: Upper bound of the number of keys of a sequence.
    """

    def __init__(self, lengths: Lengths, device: torch.device) -> None:
        keys, own = [], []
        copies: list[tuple[list[Tensor], list[Tensor]]] = []
        queries, seen = [0], [0]
        start = total = 0
        for prompt, first, *others in lengths:
            end = start + prompt + first
            keys.append(torch.arange(start, end))
            own.append(torch.arange(total, total + prompt + first))
            queries.append(prompt + first)
            seen.append(prompt + first)
            total += prompt + first
            for number, length in enumerate(others):
                prompt_keys = torch.arange(start, start + prompt)
                keys += [prompt_keys, torch.arange(end, end + length)]
                own.append(torch.arange(total + prompt, total + prompt + length))
                if number == len(copies):
                    copies.append(([], []))
                copies[number][0].append(prompt_keys)
                copies[number][1].append(torch.arange(total, total + prompt))
                queries.append(length)
                seen.append(prompt + length)
                total += prompt + length
                end += length
            start = end
        self.max_query, self.max_key = (-(-max(sizes) // _BLOCK) * _BLOCK for sizes in (queries, seen))
        self.keys, self.own = (to_device(torch.cat(part), device) for part in (keys, own))
        self.copies = [tuple(to_device(torch.cat(part), device) for part in pair) for pair in copies]
        self.query_offsets, self.key_offsets = (
            to_device(torch.tensor(sizes).cumsum(0).int(), device) for sizes in (queries, seen)
        )

    def gather(self, tensor: Tensor) -> Tensor:
        """Gather the keys or values of all sequences, shape (N, ...) to (K, ...)."""
        return _Gather.apply(tensor, self)


class _Gather(torch.autograd.Function):
    """An index select whose gradient needs neither sorting nor atomic additions to the same element."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, plan: Varlen) -> Tensor:
        ctx.plan = plan
        return tensor.index_select(0, plan.keys)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.index_select(0, ctx.plan.own)
        for token_indices, copies in ctx.plan.copies:
            total.index_add_(0, token_indices, gradient.index_select(0, copies))
        return total, None
