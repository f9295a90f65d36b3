"""Answers as rewards see them where thinking is withheld."""

from dataclasses import replace
from typing import Any

from rlhf_pl.models.thinking import Marks, is_prefilled, text_without_thinking, tokens_without_thinking
from rlhf_pl.rewards.base import Sample

_KEYS = ("reasoning_content", "reasoning", "thinking")  # where messages keep it apart


def without_thinking(sample: Sample, marks: Marks, prompt: str = "", tokenizer: Any = None) -> Sample:
    """The sample without what was thought; empty and unfinished if the answer ends inside its thinking.

    Args:
        sample: Of a policy, or of a data file.
        marks: What opens and what closes the thinking.
        prompt: The end of the rendered prompt, special tokens included.
        tokenizer: The policy's, for the answer's tokens, and for marks that are special tokens.
    """
    opened = is_prefilled(prompt, marks)
    text = text_without_thinking(sample.response, marks, opened)
    ids = list(sample.response_tokens)
    kept: list[int] | None = ids
    if tokenizer is not None and ids:
        kept = tokens_without_thinking(ids, tokenizer.decode, marks, opened)
        special = set(marks) & set(tokenizer.all_special_tokens)
        if special:  # the text is without them
            text = None if kept is None else tokenizer.decode(kept, skip_special_tokens=True)
            text = text if text is None or kept == ids else text.lstrip()
    if text is None or kept is None:
        text, kept = "", []
        sample = replace(sample, finished=False)
    message = sample.message
    if message is not None:
        message = {k: v for k, v in message.items() if k not in _KEYS} | {"content": text}
    return replace(sample, response=text, response_tokens=kept, message=message)
