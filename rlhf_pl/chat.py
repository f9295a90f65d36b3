"""Chat messages: what a valid one is, and their token ids by the model's own chat template."""

from collections.abc import Sequence
from typing import Any

Message = dict[str, str]


def message_problem(messages: Any) -> str | None:
    """What keeps `messages` from being a prompt, or None if it is one.

    A prompt is a non-empty list of `{"role": ..., "content": ...}` with text contents, the last of which is not the
    assistant's.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        return f"expected text or a list of messages, found {type(messages).__name__}"
    if not messages:
        return "the message list is empty"
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"message {i} is {type(message).__name__}, expected an object with `role` and `content`"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = type(message[key]).__name__ if key in message else "nothing"
                return f"message {i} has {found} under `{key}`, expected text"
        if not message["content"].strip():
            return f"message {i} ({message['role']}) is empty"
    if messages[-1]["role"] == "assistant":
        return "the last message is the assistant's; a prompt must end with another role"
    return None


def with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """`messages` with the system prompt in front, unless they bring their own."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def encode_prompt(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of the conversation up to the point where the assistant's answer starts.

    The template writes the special tokens (BOS among them), so the tokenizer must add none of its own.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def eos_token_ids(tokenizer: Any, *configs: Any) -> tuple[int, ...]:
    """Every id that ends an answer, ascending: the tokenizer's and those of the model and generation configs."""
    ids: set[int] = set()
    for value in [tokenizer.eos_token_id, *(getattr(c, "eos_token_id", None) for c in configs)]:
        if value is not None:
            ids.update(value if isinstance(value, list | tuple) else [value])
    return tuple(sorted(ids))
