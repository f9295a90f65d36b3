"""Removes thinking from the responses that rewards see."""

from dataclasses import replace
from typing import Any

from rlhf_pl.models.thinking import Marks, is_prefilled, text_without_thinking, tokens_without_thinking
from rlhf_pl.rewards.base import Sample

_KEYS = ("reasoning_content", "reasoning", "thinking")  # keys of messages that contain it separately


def remove_thinking(sample: Sample, marks: Marks, prompt: str = "", tokenizer: Any = None) -> Sample:
    """Remove thinking from a sample. If the response ends inside its thinking, it becomes empty and unfinished.

    Args:
        sample: A sample from a policy or a data file.
        marks: The texts that open and close thinking.
        prompt: The end of the rendered prompt, including special tokens.
        tokenizer: The policy's, for the response's tokens and for marks that are special tokens.
    """
    is_opened = is_prefilled(prompt, marks)
    text = text_without_thinking(sample.response, marks, is_opened)
    ids = list(sample.response_tokens)
    kept: list[int] | None = ids
    if tokenizer is not None and ids:
        kept = tokens_without_thinking(ids, tokenizer.decode, marks, is_opened)
        special = set(marks) & set(tokenizer.all_special_tokens)
        if special:  # `sample.response` does not contain them
            text = None if kept is None else tokenizer.decode(kept, skip_special_tokens=True)
            text = text if text is None or kept == ids else text.lstrip()
    if text is None or kept is None:
        text, kept = "", []
        sample = replace(sample, finished=False)
    message = sample.message
    if message is not None:
        message = {k: v for k, v in message.items() if k not in _KEYS} | {"content": text}
    return replace(sample, response=text, response_tokens=kept, message=message)
