"""Chat templates: messages are rendered unchanged, unless the template would write them wrongly."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.run_date import strftime_now

Messages = list[dict[str, Any]]
CALL_KEYS = ("tool_calls", "function_call")
# arguments of `apply_chat_template` that the trainer sets, or that have their own option
_RESERVED = (
    "conversation",
    "messages",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "strftime_now",
)
_MARKER = "Xqzjw"


def check_template_kwargs(tokenizer: Any, given: Mapping[str, Any] | None, option: str) -> None:
    """Raise InputError for reserved variables, and for variables that this chat template never reads."""
    check_variables(tokenizer.chat_template, given, option)


def check_variables(chat_template: str | Mapping[str, str], given: Mapping[str, Any] | None, option: str) -> None:
    """Raise InputError for reserved variables, and for variables that none of these chat templates reads."""
    known = find_template_variables(chat_template) if given else set()
    for name in given or ():
        if name in _RESERVED:
            raise InputError(f"`{option}` sets {name!r}, which the trainer sets. Remove it.")
        if name not in known:
            raise InputError(
                f"`{option}` sets {name!r}, which the chat template never reads. Remove it, or correct the name."
            )


def find_template_variables(chat_template: str | Mapping[str, str]) -> set[str]:
    """The variables that a chat template, or any of several named ones, reads without setting them itself.

    Raises:
        InputError: A template is not valid Jinja.
    """
    from jinja2 import TemplateError
    from jinja2.meta import find_undeclared_variables
    from transformers.utils.chat_template_utils import _compile_jinja_template

    sources = list(chat_template.values()) if isinstance(chat_template, Mapping) else [chat_template]
    if not sources or not all(isinstance(source, str) for source in sources):
        raise InputError("the chat template is not text")
    try:
        parsed = [_compile_jinja_template(source).environment.parse(source) for source in sources]
    except TemplateError as error:
        raise InputError(f"the chat template is not a Jinja template: {error}") from error
    return set().union(*map(find_undeclared_variables, parsed))


class ChatTemplate:
    """A tokenizer's chat template with its variables.

    Args:
        tokenizer: Has a chat template.
        kwargs: Further variables, for example `{"enable_thinking": False}`; the template gets those that it mentions.
    """

    def __init__(self, tokenizer: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        source = str(tokenizer.chat_template)
        variables = {**(kwargs or {}), "strftime_now": strftime_now}
        self.kwargs = {name: value for name, value in variables.items() if name in source}

    def render(self, messages: Sequence[Any], tools: Any = None, generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Raises:
            InputError: The template rejects it.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=None if not tools else list(tools),
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self.kwargs,
            )
        except Exception as error:  # templates raise errors of any class
            roles = [m["role"] for m in messages]
            raise InputError(f"the chat template rejects the roles {roles}: {error}") from error

    def prepare(self, messages: Sequence[Any], tools: Any = None, need_tools: bool = True) -> Messages:
        """Convert the messages to a form that this template writes completely.

        The messages stay unchanged if the template can write them. Otherwise, content parts become text or text becomes
        parts, arguments of tool calls are converted from JSON text to objects or back, null contents become empty, and
        empty contents of messages with tool calls become null.

        Args:
            messages: A conversation.
            tools: The conversation's tools.
            need_tools: Whether it is an error if the template omits the tools or whole messages.

        Raises:
            InputError: The template rejects the messages, or omits messages, tools or tool calls.
        """
        given = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
        prepared, text = self._find_form(given, tools)
        if any(_is_tool_result(m) and str(m["content"]) in text for m in prepared):
            raise InputError("the chat template writes a tool's result as Python; provide it as JSON text")
        if tools and need_tools and not self.writes_tools(prepared, tools, text):
            raise InputError(
                "the chat template does not write the `tools` of this row, so the model would never see them. Set "
                "`chat_template` to a template that does, or set `columns.tools` to another column"
            )
        lost = self.find_lost_messages(prepared, text, tools) if need_tools else []
        if lost:
            raise InputError(
                f"the chat template writes nothing of message {lost[0]} ({prepared[lost[0]]['role']}), so the model "
                "would never see it. Set `chat_template` to a template that does, or remove such messages"
            )
        return prepared

    def writes_tools(self, messages: Messages, tools: Any, text: str | None = None) -> bool:
        """Whether the template's text depends on `tools`."""
        return self._try_render(messages, None) != (self.render(messages, tools) if text is None else text)

    def _find_form(self, given: Messages, tools: Any) -> tuple[Messages, str]:
        """(the first form of the messages that is written correctly, its text), with as few changes as possible."""
        needed: dict[Callable[[Any], Any], Callable[[Messages, str, Any], bool]] = {
            _parts_to_text: self._misreads_parts,
            _arguments_to_objects: self._misreads_arguments,
            _null_to_empty: self._misreads_null,
            _text_to_parts: self._misreads_text,
            _arguments_to_json: _never_misread,
            _empty_to_null: _never_misread,
        }
        changes = [change for change in needed if [change(m) for m in given] != given]
        refusal = unwritten = None
        for count in range(len(changes) + 1):
            for chosen in combinations(changes, count):
                form = given
                for change in chosen:
                    form = [change(m) for m in form]
                try:
                    text = self.render(form, tools)
                except InputError as error:
                    refusal = refusal or error
                    continue
                if self._loses_calls(form, text, tools):
                    unwritten = "the chat template does not write tool calls. Set `chat_template` to one that does"
                elif not any(needed[change](form, text, tools) for change in changes if change not in chosen):
                    return form, text
        if unwritten is not None:
            raise InputError(unwritten)
        raise refusal or InputError("the chat template does not write these messages")

    def _try_render(self, messages: Messages, tools: Any) -> str | None:
        try:
            return self.render(messages, tools)
        except InputError:
            return None

    def _misreads_parts(self, form: Messages, text: str, tools: Any) -> bool:
        """Whether a template that takes text writes a single text part differently from the same text."""
        plain = [_parts_to_text(m) for m in form]
        single = [m | {"content": [{"type": "text", "text": f["content"]}]} if m != f else m
                  for m, f in zip(form, plain, strict=True)]  # fmt: skip
        as_text = self._try_render(plain, tools)
        if as_text is None or (
            self.find_lost_messages(plain, as_text, tools) and not self.find_lost_messages(form, text, tools)
        ):
            return False
        return self._try_render(single, tools) != as_text

    def _misreads_text(self, form: Messages, text: str, tools: Any) -> bool:
        """Whether the template omits text that it would write as a content part."""
        if not self.find_lost_messages(form, text, tools):
            return False
        parts = [_text_to_parts(m) for m in form]
        as_parts = self._try_render(parts, tools)
        if as_parts is None or self.find_lost_messages(parts, as_parts, tools):
            return False
        written = (write(part) for m in parts for part in m.get("content") or () for write in (str, json.dumps))
        return not any(whole in as_parts for whole in written)  # parts printed as Python or JSON do not count

    def find_lost_messages(self, form: Messages, text: str, tools: Any) -> list[int]:
        """Indices of messages whose content the template omits; text beside a tool call may be omitted."""
        missing = [i for i, m in enumerate(form) if not any(m.get(key) for key in CALL_KEYS)]
        missing = [i for i in missing if any(piece.strip() not in text for piece in _content_texts(form[i]))]
        if not missing:
            return []
        marks = {i: f"{_MARKER}{i}x" for i in missing}
        marked = self._try_render([_with_text(m, marks[i]) if i in marks else m for i, m in enumerate(form)], tools)
        return [] if marked is None else [i for i in missing if marks[i].casefold() not in marked.casefold()]

    def _loses_calls(self, form: Messages, text: str, tools: Any) -> bool:
        """Whether the template omits the tool calls of any message."""
        for i, message in enumerate(form):
            bare = _without_calls(message)
            if (
                any(message.get(key) for key in CALL_KEYS)
                and self._try_render([*form[:i], bare, *form[i + 1 :]], tools) == text
            ):
                return True
        return False

    def _misreads_arguments(self, form: Messages, text: str, tools: Any) -> bool:
        """Whether the template encodes JSON text as JSON a second time."""
        return any(json.dumps(a, ensure_ascii=False) in text or json.dumps(a) in text for a in _json_arguments(form))

    def _misreads_null(self, form: Messages, text: str, tools: Any) -> bool:
        """Whether the template writes a null content as `None`."""
        marked = self._try_render([m | {"content": _MARKER} if _null_to_empty(m) != m else m for m in form], tools)
        return marked is not None and _MARKER in marked and marked.replace(_MARKER, "None") == text


def _is_tool_result(message: Mapping[str, Any]) -> bool:
    """Whether a content is an object, a boolean or a list of values that are not parts, as tools return them."""
    content = message.get("content")
    return isinstance(content, Mapping | list | bool) and not _is_parts(content)


def _is_parts(content: Any) -> bool:
    if not isinstance(content, list) or not content:
        return False
    return all(isinstance(part, Mapping) and part.get("type") == "text" for part in content)


def _parts_to_text(message: dict[str, Any]) -> dict[str, Any]:
    """Join content parts to one text, as vLLM does."""
    content: Any = message.get("content")
    return message | {"content": "\n".join(part["text"] for part in content)} if _is_parts(content) else message


def _text_to_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Make a text the only part of a content."""
    content = message.get("content")
    return _with_text(message | {"content": [content]}, content) if isinstance(content, str) else message


def _with_text(message: dict[str, Any], text: str) -> dict[str, Any]:
    """Replace the message's text, or its parts, by another text."""
    as_parts = isinstance(message.get("content"), list)
    return message | {"content": [{"type": "text", "text": text}] if as_parts else text}


def _content_texts(message: Mapping[str, Any]) -> list[str]:
    """The texts of a message's content."""
    content: Any = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content] if _is_parts(content) else []


def _empty_to_null(message: dict[str, Any]) -> dict[str, Any]:
    """Replace an empty content beside tool calls by null."""
    return message | {"content": None} if message.get("content") == "" and message.get("tool_calls") else message


def _never_misread(form: Messages, text: str, tools: Any) -> bool:
    """For changes that are only made where the template rejects the messages or omits tool calls."""
    return False


def _null_to_empty(message: dict[str, Any]) -> dict[str, Any]:
    """Replace a null content by an empty one."""
    return message if message.get("content") is not None else message | {"content": ""}


def _arguments_to_objects(message: dict[str, Any]) -> dict[str, Any]:
    """Parse arguments of tool calls that are JSON text."""
    return _change_arguments(message, _parse_object)


def _arguments_to_json(message: dict[str, Any]) -> dict[str, Any]:
    """Write arguments of tool calls that are objects as JSON text."""
    return _change_arguments(message, lambda a: json.dumps(a, ensure_ascii=False) if isinstance(a, Mapping) else None)


def _change_arguments(message: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    return message | {"tool_calls": [_change_call(c, change) for c in calls]} if isinstance(calls, list) else message


def _change_call(call: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _change_call(call["function"], change)}
    value = change(call.get("arguments"))
    return call if value is None else {**call, "arguments": value}


def _json_arguments(messages: Messages) -> list[str]:
    """Arguments of tool calls that are JSON text of an object."""
    given = [m.get("tool_calls") for m in messages]
    calls = [call for listed in given if isinstance(listed, list) for call in listed if isinstance(call, Mapping)]
    inner = [call["function"] if isinstance(call.get("function"), Mapping) else call for call in calls]
    return [c["arguments"] for c in inner if _parse_object(c.get("arguments")) is not None]


def _parse_object(arguments: Any) -> dict[str, Any] | None:
    if not isinstance(arguments, str):
        return None
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _without_calls(message: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in message.items() if k not in CALL_KEYS}
