"""Removes a model's thinking from its responses."""

from collections.abc import Callable, Sequence

Marks = tuple[str, str]
Decode = Callable[[Sequence[int]], str]


def is_prefilled(prompt: str, marks: Marks) -> bool:
    """Whether a prompt ends with an opening mark, so that the response starts inside a thought."""
    return prompt.rstrip().endswith(marks[0].strip())


def text_without_thinking(response: str, marks: Marks, opened: bool = False) -> str | None:
    """A response without its thoughts; None if it ends inside a thought.

    Args:
        response: The text. Text before a closing mark without an opening mark is a thought too.
        marks: Opening and closing mark of a thought.
        opened: Whether the prompt ends with an opening mark.
    """
    spans = _find_spans_outside_thoughts(response, marks, opened)
    if spans is None:
        return None
    text = "".join(response[start:end] for start, end in spans)
    return text if text == response else text.lstrip()


def tokens_without_thinking(ids: Sequence[int], decode: Decode, marks: Marks, opened: bool = False) -> list[int] | None:
    """The token ids of a response outside its thoughts and their marks; None if it ends inside a thought.

    Args:
        ids: The response's token ids.
        decode: Returns the text of token ids, including special tokens: the marks may be special tokens.
        marks: Opening and closing mark of a thought.
        opened: Whether the prompt ends with an opening mark.
    """
    text = decode(ids)
    spans = _find_spans_outside_thoughts(text, marks, opened)
    if spans is None:
        return None

    def tokens_up_to(end: int) -> int:
        """Number of tokens that contain the first `end` characters."""
        return _find_first(len(ids), lambda n: decode(ids[:n])[:end] == text[:end])

    kept: list[int] = []
    for start, end in spans:
        last = len(ids) if end == len(text) else tokens_up_to(end + 1) - 1
        kept += ids[tokens_up_to(start) : last]
    return kept


def _find_spans_outside_thoughts(text: str, marks: Marks, opened: bool) -> list[tuple[int, int]] | None:
    """Start and end of the parts of a text outside thoughts; None if it ends inside a thought."""
    opened = _begins_inside_thought(text, marks, opened)
    spans: list[tuple[int, int]] = []
    start = 0
    while (found := text.find(marks[opened], start)) >= 0:
        if not opened:
            spans.append((start, found))
        start = found + len(marks[opened])
        # after nested thoughts, the closing mark of the outer one has no opening mark
        opened = not opened or _begins_inside_thought(text[start:], marks, False)
    return None if opened else [*spans, (start, len(text))]


def _begins_inside_thought(text: str, marks: Marks, opened: bool) -> bool:
    first = {mark: text.find(mark) for mark in marks}
    unopened = first[marks[1]] >= 0 and not 0 <= first[marks[0]] < first[marks[1]]
    # the model may repeat the opening mark of its prompt
    return unopened or (opened and not text.lstrip().startswith(marks[0]))


def _find_first(count: int, holds: Callable[[int], bool]) -> int:
    """The smallest n up to `count` for which a monotone condition holds."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
