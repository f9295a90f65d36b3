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
    spans = _answer_spans(response, marks, opened)
    if spans is None:
        return None
    text = "".join(response[start:end] for start, end in spans)
    return text if text == response else text.lstrip()


def answer_tokens(ids: Sequence[int], decode: Decode, marks: Marks, opened: bool = False) -> list[int] | None:
    """The same for token ids: those that lie outside of thoughts and marks; None if they end inside of a thought.

    Args:
        ids: The response.
        decode: Gives their text, special tokens included: marks may be such.
        marks: What opens and what closes a thought.
        opened: Whether the prompt has opened one.
    """
    text = decode(ids)
    spans = _answer_spans(text, marks, opened)
    if spans is None:
        return None

    def tokens_up_to(end: int) -> int:
        """How many tokens it takes for the first `end` characters."""
        return _first(len(ids), lambda n: decode(ids[:n])[:end] == text[:end])

    kept: list[int] = []
    for start, end in spans:
        last = len(ids) if end == len(text) else tokens_up_to(end + 1) - 1
        kept += ids[tokens_up_to(start) : last]
    return kept


def _answer_spans(text: str, marks: Marks, opened: bool) -> list[tuple[int, int]] | None:
    """Where the parts of a text that are no thought begin and end; None if it ends inside of a thought."""
    opened = _begins_inside(text, marks, opened)
    spans: list[tuple[int, int]] = []
    start = 0
    while (found := text.find(marks[opened], start)) >= 0:
        if not opened:
            spans.append((start, found))
        start = found + len(marks[opened])
        # after thoughts inside of a thought its own closing mark comes without an opening one
        opened = not opened or _begins_inside(text[start:], marks, False)
    return None if opened else [*spans, (start, len(text))]


def _begins_inside(text: str, marks: Marks, opened: bool) -> bool:
    first = {mark: text.find(mark) for mark in marks}
    unopened = first[marks[1]] >= 0 and not 0 <= first[marks[0]] < first[marks[1]]
    # a model may open the thought that its prompt has opened once more
    return unopened or (opened and not text.lstrip().startswith(marks[0]))


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """The least n for which something holds that then holds for all larger ones up to `count`."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
