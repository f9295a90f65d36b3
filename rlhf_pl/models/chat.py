"""Chat messages: validation, text, and token ids of conversations by the model's own chat template."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_pl.models.chat_template import CALL_KEYS, ChatTemplate
from rlhf_pl.utils.errors import InputError

Message = dict[str, Any]
Tools = Sequence[Mapping[str, Any]]

_TOOL_ROLES = ("tool", "function", "ipython")  # roles whose content is a tool's result: it may be empty, or an object
_CONTENT_KEYS = (*CALL_KEYS, "reasoning_content", "reasoning", "thinking")  # keys that may replace the content


def find_prompt_problem(messages: Any) -> str | None:
    """Describe why `messages` is not a valid prompt; return None if it is one.

    A prompt is a conversation (see `find_conversation_problem`) that does not end with a message of the assistant.
    """
    if problem := find_conversation_problem(messages):
        return problem
    if messages[-1]["role"] == "assistant":
        return "the last message is the assistant's; a prompt must end with another role"
    return None


def find_conversation_problem(messages: Any) -> str | None:
    """Describe why `messages` is not a valid conversation; return None if it is one.

    A conversation is a non-empty list of `{"role": ..., "content": ...}`. Contents are text or parts of type `text`.
    They may be empty or null if the message has a tool call or another key with content.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        return f"expected text or a list of messages, found {type(messages).__name__}"
    if not messages:
        return "the message list is empty"
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            return f"message {i} is {type(message).__name__}, expected an object with `role` and `content`"
        if not isinstance(message.get("role"), str):
            return f"message {i} has {_type_under(message, 'role')} under `role`, expected text"
        if problem := _find_content_problem(message) or _find_weight_problem(message):
            return f"message {i} {problem}"
    return None


def _type_under(message: Mapping[str, Any], key: str) -> str:
    return type(message[key]).__name__ if key in message else "nothing"


def _find_content_problem(message: Mapping[str, Any]) -> str | None:
    content, role = message.get("content"), message["role"]
    has_other_content = any(message.get(key) for key in _CONTENT_KEYS)
    if isinstance(content, str):
        if content.strip() or has_other_content or role in _TOOL_ROLES:
            return None
        return f"({role}) is empty"
    if role in _TOOL_ROLES and isinstance(content, Mapping | list | int | float):
        return None
    if isinstance(content, list) and content:
        return next((problem for part in content if (problem := _find_part_problem(part))), None)
    if has_other_content and not content:
        return None
    return f"has {_type_under(message, 'content')} under `content`, expected text"


def _find_part_problem(part: Any) -> str | None:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        return 'has a content part that is not an object with a `type`, expected {"type": "text", "text": ...}'
    if part["type"] != "text":
        return f"has a content part of type `{part['type']}`; only text is supported, so remove such rows"
    if not isinstance(part.get("text"), str):
        return "has a content part of type `text` without text under `text`"
    return None


def _find_weight_problem(message: Mapping[str, Any]) -> str | None:
    weight = message.get("weight")
    if weight is None or (isinstance(weight, int | float) and weight in (0, 1)):
        return None
    return f"has the weight {weight!r}, expected 1 (train on it) or 0 (do not)"


def is_trained_on(message: Message) -> bool:
    """Whether a message is trained on: one of the assistant, with a `weight` other than 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a message, with its parts joined by newlines; empty for a message with only tool calls."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "\n".join(part["text"] for part in content)
    return json.dumps(content, ensure_ascii=False, default=str)


def plain_text(message: Mapping[str, Any]) -> str:
    """A message without a chat template: its text, then its tool calls as JSON."""
    calls = [json.dumps(message[key], ensure_ascii=False, default=str) for key in CALL_KEYS if message.get(key)]
    return "\n".join(text for text in (message_text(message), *calls) if text)


def is_same_response(one: Message, other: Message) -> bool:
    """Whether two responses are equal, ignoring leading and trailing white space."""
    return [_other_keys(one), message_text(one).strip()] == [_other_keys(other), message_text(other).strip()]


def _other_keys(message: Message) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in ("content", "weight")}


def is_empty(message: Message) -> bool:
    """Whether a response has neither text nor a tool call."""
    return not message_text(message).strip() and not any(message.get(key) for key in CALL_KEYS)


def with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """`messages` with the system prompt prepended, unless they have their own."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def encode_prompt(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Tools | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of the conversation up to the start of the assistant's response.

    The template writes all special tokens, including BOS, so the tokenizer adds none.

    Raises:
        InputError: The template rejects the messages, or would omit tools or tool calls.
    """
    template = ChatTemplate(tokenizer, chat_template_kwargs)
    text = template.render(template.prepare(messages, tools), tools, True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def eos_token_ids(tokenizer: Any, *configs: Any) -> tuple[int, ...]:
    """Every EOS token id in ascending order: the tokenizer's and those of the model and generation configs."""
    ids: set[int] = set()
    for value in [tokenizer.eos_token_id, *(getattr(c, "eos_token_id", None) for c in configs)]:
        if value is not None:
            ids.update(value if isinstance(value, list | tuple) else [value])
    return tuple(sorted(ids))


def encode_conversation(
    tokenizer: Any,
    messages: Sequence[Message],
    eos: Sequence[int],
    every_response: bool = True,
    tools: Tools | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    whole: bool = False,
) -> tuple[list[int], list[bool]]:
    """Token ids of a whole conversation, and a mask of the tokens to train on.

    A response starts where generation would start and includes its EOS. Prompts and responses are tokenized
    separately, as in generation.

    Args:
        tokenizer: Has a chat template.
        messages: The last one is the assistant's. A response with `weight: 0` is not trained on.
        eos: Ids of the EOS tokens.
        every_response: Mark all messages of the assistant, or only the last one.
        tools: The template's variable `tools`.
        chat_template_kwargs: Further variables of the template.
        whole: Train on every token of the conversation, also outside of responses, except messages with `weight: 0`.
            Earlier responses may then be written differently from last ones, such as without their thinking.

    Returns:
        (ids, mask) of equal length; the mask is True at tokens to train on: responses, or everything.

    Raises:
        InputError: The template rejects the messages, writes no EOS after a response, writes earlier turns differently
            from last ones, or would omit tools or tool calls.
    """
    template = ChatTemplate(tokenizer, chat_template_kwargs)
    prepared = template.prepare(messages, tools)
    text = template.render(prepared, tools)
    responses = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    trained = [i for i in (responses if every_response else responses[-1:]) if is_trained_on(messages[i])]
    untrained = [i for i, message in enumerate(messages) if message.get("weight") == 0] if whole else []
    ids: list[int] = []
    mask: list[bool] = []
    position = 0

    def add(piece: str, is_response: bool = False, counts: bool = whole) -> None:
        tokens = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
        end = len(tokens) if counts else 0
        if is_response:
            ends = [i for i, token in enumerate(tokens) if token in eos]
            if not ends:
                raise InputError(
                    "the chat template writes no EOS after the response: the model would never learn to stop"
                )
            end = len(tokens) if counts else ends[-1] + 1
        ids.extend(tokens)
        mask.extend(i < end for i in range(len(tokens)))

    for i in sorted({*trained, *untrained}):
        if i == 0 and i in trained:
            raise InputError(
                "message 0 is a response without a prompt; give it `weight: 0`, or train on the last response only "
                "(loss_on: last)"
            )
        is_response = messages[i]["role"] == "assistant"
        before = template.render(prepared[:i], tools, is_response) if i > 0 else ""
        through = template.render(prepared[: i + 1], tools)
        if not text.startswith(through):
            if whole and i in trained and i != len(messages) - 1:  # it counts as the whole text has it
                continue
            last_only = "train on the last response only (loss_on: last)"
            hint = last_only if every_response and len(trained) > 1 else "change it"
            raise InputError(f"the chat template writes message {i} differently when more messages follow; {hint}")
        if not through.startswith(before):
            raise InputError(
                f"the chat template starts message {i} differently from its generation prompt (...{before[-40:]!r}), "
                "so the model would learn a response that it is never asked for. Set `data.chat_template_kwargs` or "
                "the template so that both agree"
            )
        add(text[position : len(before)])
        add(text[len(before) : len(through)], i in trained, whole and i in trained)
        position = len(through)
    add(text[position:])
    return ids, mask
