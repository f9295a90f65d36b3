"""Chat messages: what a valid one is, and their token ids by the model's own chat template."""

from collections.abc import Sequence
from typing import Any

from rlhf_pl.errors import InputError

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


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], eos: Sequence[int], every_answer: bool = True
) -> tuple[list[int], list[bool]]:
    """Token ids of a whole conversation, and which of them the assistant says.

    An answer is what stands between the point where it would be generated and its EOS, which belongs to it. Prompts
    and answers are tokenized apart, as they are when the model answers.

    Args:
        tokenizer: With a chat template.
        messages: The last one is the assistant's.
        eos: Ids that end an answer.
        every_answer: Mark all the assistant's messages, or only the last one.

    Returns:
        (ids, mask), equally long; the mask is True at answers.

    Raises:
        InputError: The template writes no EOS after an answer, or writes earlier turns otherwise than last ones.
    """
    text = _render(tokenizer, messages, False)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    ids: list[int] = []
    mask: list[bool] = []
    position = 0

    def add(piece: str, count: int = 0) -> None:
        tokens = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
        end = 0
        if count:
            ends = [i for i, token in enumerate(tokens) if token in eos]
            if not ends:
                raise InputError("the chat template writes no EOS after the answer: a model would never learn to stop")
            end = ends[-1] + 1
        ids.extend(tokens)
        mask.extend(i < end for i in range(len(tokens)))

    for i in answers if every_answer else answers[-1:]:
        before, through = _render(tokenizer, messages[:i], True), _render(tokenizer, messages[: i + 1], False)
        if not (text.startswith(through) and through.startswith(before)):
            hint = "take the last answer alone (loss_on: last)" if every_answer and len(answers) > 1 else "change it"
            raise InputError(f"the chat template writes message {i} otherwise when more follows; {hint}")
        add(text[position : len(before)])
        add(text[len(before) : len(through)], 1)
        position = len(through)
    add(text[position:])
    return ids, mask


def _render(tokenizer: Any, messages: Sequence[Message], generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)
    except Exception as error:  # each template refuses in its own way
        raise InputError(f"the chat template refuses the roles {[m['role'] for m in messages]}: {error}") from error
