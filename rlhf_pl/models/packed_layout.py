"""Where prompts and answers lie in a flat row of tokens, and what attention kernels are told about it."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Lengths = tuple[tuple[int, ...], ...]

_BLOCK = 128  # longest sequences are rounded up to it, so that kernels see few different sizes


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on `device` that the host does not wait for."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Layout:
    """The lengths of trees that lie one after the other: of each its prompt, then its answers.

    Args:
        lengths: Of each tree the tokens of its prompt and of every answer; one answer at least.
        device: Of the tensors made from them, once each.
    """

    def __init__(self, lengths: Lengths, device: torch.device | str = "cpu") -> None:
        self.lengths, self.device = lengths, torch.device(device)
        self._masks: dict[Any, Any] = {}

    def to(self, device: torch.device | str) -> "Layout":
        """The same layout for another device; tensors for GPU kernels are made at once, where the host has time."""
        moved = Layout(self.lengths, device)
        if moved.device.type == "cuda":
            _ = moved.varlen
        return moved

    @cached_property
    def varlen(self) -> "Varlen":
        """For kernels over sequences of different lengths."""
        with torch.device("cpu"):  # whatever device Lightning has made the default
            return Varlen(self.lengths, self.device)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each of the N tokens its tree, its answer (-1 in prompts), and its position, each of shape (N,), int32."""
        with torch.device("cpu"):
            return self._places()

    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        trees, answers, positions = [], [], []
        answer = 0
        for number, (prompt, *others) in enumerate(self.lengths):
            trees.append(torch.full((prompt + sum(others),), number))
            answers.append(torch.full((prompt,), -1))
            positions.append(torch.arange(prompt))
            for length in others:
                answers.append(torch.full((length,), answer))
                positions.append(torch.arange(prompt, prompt + length))
                answer += 1
        return tuple(to_device(torch.cat(part).int(), self.device) for part in (trees, answers, positions))  # type: ignore[return-value]

    def sees(self, window: int | None) -> Callable[[Any, Any, Any, Any], Tensor]:
        """A mask for FlexAttention: (batch, head, query, key) -> whether the query sees the key."""
        tree, answer, position = self.places

        def mask(batch: Any, head: Any, query: Any, key: Any) -> Tensor:
            inside = (tree[query] == tree[key]) & ((answer[key] == -1) | (answer[query] == answer[key]))
            seen = inside & (position[key] <= position[query])
            return seen if window is None else seen & (position[query] - position[key] < window)

        return mask

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for this layout."""
        if key not in self._masks:
            self._masks[key] = make()
        return self._masks[key]


class Varlen:
    """Queries, keys and values as independent sequences: a tree's prompt with its first answer, then each other answer,
    whose keys and values are the prompt's and its own.

    Args:
        lengths: See `Layout`.
        device: Of the tensors.

    Attributes:
        keys: Places among the N tokens of all sequences' keys, one sequence after the other, shape (K,), int64.
        own: Where each of the N tokens stands among the K as a token of its own sequence, shape (N,), int64.
        copies: For the second, third, ... answers of all trees: prompt tokens among the N, and their copies among the
            K, each pair of shape (C,), int64. No token comes twice in a pair.
        query_offsets: Where each sequence's queries start, and the end, shape (sequences + 1,), int32.
        key_offsets: The same of keys.
        max_query: No sequence has more queries.
        max_key: No sequence has more keys.
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
        """Keys or values of all sequences, shape (N, ...) to (K, ...)."""
        return _Gather.apply(tensor, self)


class _Gather(torch.autograd.Function):
    """An index whose gradient is a sum without sorting and without atomic additions to one place."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, plan: Varlen) -> Tensor:
        ctx.plan = plan
        return tensor.index_select(0, plan.keys)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.index_select(0, ctx.plan.own)
        for places, copies in ctx.plan.copies:
            total.index_add_(0, places, gradient.index_select(0, copies))
        return total, None
