"""Takes what a model thought before it answered out of its responses."""

from collections.abc import Callable, Sequence

Marks = tuple[str, str]
Decode = Callable[[Sequence[int]], str]


def is_prefilled(prompt: str, marks: Marks) -> bool:
    """Whether a prompt ends with an opened thought, so that the response begins inside of it."""
    return prompt.rstrip().endswith(marks[0].strip())


def answer_text(response: str, marks: Marks, opened: bool = False) -> str | None:
    """A response without its thoughts; None if it ends inside of one.

    Args:
        response: The text. What stands before a closing mark that no opening mark precedes is a thought, too.
        marks: What opens and what closes a thought.
        opened: Whether the prompt has opened one.
    """
    kept: list[str] = []
    opened, rest = _begins_inside(response, marks, opened), response
    while True:
        before, found, after = rest.partition(marks[opened])
        if not found:
            break
        kept += [] if opened else [before]
        opened, rest = not opened, after
    if opened:
        return None
    return "".join([*kept, rest]).lstrip() if rest is not response else response


def answer_tokens(ids: Sequence[int], decode: Decode, marks: Marks, opened: bool = False) -> list[int] | None:
    """The same for token ids: those that stand outside of thoughts; None if they end inside of one.

    Args:
        ids: The response.
        decode: Gives their text, special tokens included: marks may be such.
        marks: What opens and what closes a thought.
        opened: Whether the prompt has opened one.
    """
    kept: list[int] = []
    rest = list(ids)
    opened = _begins_inside(decode(rest), marks, opened)
    while (found := _place(rest, decode, marks[opened])) is not None:
        start, end = found
        kept += [] if opened else rest[:start]
        opened, rest = not opened, rest[end:]
    return None if opened else kept + rest


def _place(ids: list[int], decode: Decode, mark: str) -> tuple[int, int] | None:
    """The tokens that hold the first `mark`: from where, and up to where."""
    end = _first(len(ids), lambda n: mark in decode(ids[:n]))
    if end is None:
        return None
    return end - (_first(end, lambda n: mark in decode(ids[end - n : end])) or 0), end


def _begins_inside(text: str, marks: Marks, opened: bool) -> bool:
    first = {mark: text.find(mark) for mark in marks}
    unopened = first[marks[1]] >= 0 and not 0 <= first[marks[0]] < first[marks[1]]
    # a model may open the thought that its prompt has opened once more
    return unopened or (opened and not text.lstrip().startswith(marks[0]))


def _first(count: int, holds: Callable[[int], bool]) -> int | None:
    """The least n up to `count` for which something holds that then holds for all larger ones."""
    if not holds(count):
        return None
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
