"""Chat messages: what a valid one is, its text, and conversations' token ids by the model's own chat template."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_pl.models.chat_template import CALLS, ChatTemplate
from rlhf_pl.utils.errors import InputError

Message = dict[str, Any]
Tools = Sequence[Mapping[str, Any]]

_RESULTS = ("tool", "function", "ipython")  # roles whose content is what a tool returned: may be empty, or an object
_SAYING = (*CALLS, "reasoning_content", "reasoning", "thinking")  # keys that can stand without a content


def message_problem(messages: Any) -> str | None:
    """What keeps `messages` from being a prompt, or None if it is one.

    A prompt is a conversation (see `conversation_problem`) that does not end with the assistant's message.
    """
    if problem := conversation_problem(messages):
        return problem
    if messages[-1]["role"] == "assistant":
        return "the last message is the assistant's; a prompt must end with another role"
    return None


def conversation_problem(messages: Any) -> str | None:
    """What keeps `messages` from being a conversation, or None if it is one.

    A conversation is a non-empty list of `{"role": ..., "content": ...}`. Contents are text or parts of type `text`;
    they may be empty or null beside a tool call or another key that says something.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        return f"expected text or a list of messages, found {type(messages).__name__}"
    if not messages:
        return "the message list is empty"
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            return f"message {i} is {type(message).__name__}, expected an object with `role` and `content`"
        if not isinstance(message.get("role"), str):
            return f"message {i} has {_found(message, 'role')} under `role`, expected text"
        if problem := _content_problem(message) or _weight_problem(message):
            return f"message {i} {problem}"
    return None


def _found(message: Mapping[str, Any], key: str) -> str:
    return type(message[key]).__name__ if key in message else "nothing"


def _content_problem(message: Mapping[str, Any]) -> str | None:
    content, role = message.get("content"), message["role"]
    says_more = any(message.get(key) for key in _SAYING)
    if isinstance(content, str):
        if content.strip() or says_more or role in _RESULTS:
            return None
        return f"({role}) is empty"
    if role in _RESULTS and isinstance(content, Mapping | list | int | float):
        return None
    if isinstance(content, list) and content:
        return next((problem for part in content if (problem := _part_problem(part))), None)
    if says_more and not content:
        return None
    return f"has {_found(message, 'content')} under `content`, expected text"


def _part_problem(part: Any) -> str | None:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        return 'has a content part that is no object with a `type`, expected {"type": "text", "text": ...}'
    if part["type"] != "text":
        return f"has a content part of type `{part['type']}`; models are trained on text here, so leave such rows out"
    if not isinstance(part.get("text"), str):
        return "has a content part of type `text` without text under `text`"
    return None


def _weight_problem(message: Mapping[str, Any]) -> str | None:
    weight = message.get("weight")
    if weight is None or (isinstance(weight, int | float) and weight in (0, 1)):
        return None
    return f"has the weight {weight!r}, expected 1 (learn it) or 0 (do not)"


def is_learned(message: Message) -> bool:
    """Whether a message is a response to learn: the assistant's, with a `weight` other than 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a message; its parts are joined by line ends; empty for a tool call alone."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "\n".join(part["text"] for part in content)
    return json.dumps(content, ensure_ascii=False, default=str)


def spoken(message: Mapping[str, Any]) -> str:
    """A message as a reader without a chat template sees it: its text, and its tool calls as JSON."""
    calls = [json.dumps(message[key], ensure_ascii=False, default=str) for key in CALLS if message.get(key)]
    return "\n".join(text for text in (message_text(message), *calls) if text)


def same_response(one: Message, other: Message) -> bool:
    """Whether two responses say the same, white space at the ends aside."""
    return [_rest(one), message_text(one).strip()] == [_rest(other), message_text(other).strip()]


def _rest(message: Message) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in ("content", "weight")}


def is_empty(message: Message) -> bool:
    """Whether a response has neither text nor a tool call."""
    return not message_text(message).strip() and not any(message.get(key) for key in CALLS)


def with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """`messages` with the system prompt in front, unless they bring their own."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def encode_prompt(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Tools | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of the conversation up to the point where the assistant's response starts.

    The template writes the special tokens (BOS among them), so the tokenizer must add none of its own.

    Raises:
        InputError: The template refuses the messages, or would leave tools or tool calls out.
    """
    template = ChatTemplate(tokenizer, chat_template_kwargs)
    text = template.render(template.prepare(messages, tools), tools, True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def eos_token_ids(tokenizer: Any, *configs: Any) -> tuple[int, ...]:
    """Every id that ends an answer, ascending: the tokenizer's and those of the model and generation configs."""
    ids: set[int] = set()
    for value in [tokenizer.eos_token_id, *(getattr(c, "eos_token_id", None) for c in configs)]:
        if value is not None:
            ids.update(value if isinstance(value, list | tuple) else [value])
    return tuple(sorted(ids))


def encode_conversation(
    tokenizer: Any,
    messages: Sequence[Message],
    eos: Sequence[int],
    every_answer: bool = True,
    tools: Tools | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[bool]]:
    """Token ids of a whole conversation, and which of them are to be learned.

    A response is what stands between the point where it would be generated and its EOS, which belongs to it. Prompts
    and responses are tokenized apart, as they are when the model answers.

    Args:
        tokenizer: With a chat template.
        messages: The last one is the assistant's. A response with `weight: 0` is not learned.
        eos: Ids that end a response.
        every_answer: Mark all the assistant's messages, or only the last one.
        tools: What the template is given as `tools`.
        chat_template_kwargs: Further variables of the template.

    Returns:
        (ids, mask), equally long; the mask is True at responses to learn.

    Raises:
        InputError: The template refuses the messages, writes no EOS after a response, writes earlier turns otherwise
            than last ones, or would leave tools or tool calls out.
    """
    template = ChatTemplate(tokenizer, chat_template_kwargs)
    prepared = template.prepare(messages, tools)
    text = template.render(prepared, tools)
    responses = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [i for i in (responses if every_answer else responses[-1:]) if is_learned(messages[i])]
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

    for i in learned:
        if i == 0:
            raise InputError(
                "message 0 is a response to nothing; give it `weight: 0`, or take the last answer alone (loss_on: last)"
            )
        before, through = template.render(prepared[:i], tools, True), template.render(prepared[: i + 1], tools)
        if not text.startswith(through):
            hint = "take the last answer alone (loss_on: last)" if every_answer and len(learned) > 1 else "change it"
            raise InputError(f"the chat template writes message {i} otherwise when more follows; {hint}")
        if not through.startswith(before):
            raise InputError(
                f"the chat template begins message {i} otherwise than it has the model begin it "
                f"(...{before[-40:]!r}), so that it would learn a response that it is never asked for. Set "
                "`data.chat_template_kwargs` or the template so that both agree"
            )
        add(text[position : len(before)])
        add(text[len(before) : len(through)], 1)
        position = len(through)
    add(text[position:])
    return ids, mask
