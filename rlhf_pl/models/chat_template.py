"""Chat templates: what a row holds goes to the template as it is, unless the template would write it wrongly."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.run_date import strftime_now

Messages = list[dict[str, Any]]
CALLS = ("tool_calls", "function_call")
# arguments of `apply_chat_template` that are set here, or have an option of their own
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
_MARK = "Xqzjw"


def check_template_kwargs(tokenizer: Any, given: Mapping[str, Any] | None, option: str) -> None:
    """Raise InputError for variables that no chat template is given, or that this one never reads."""
    check_variables(tokenizer.chat_template, given, option)


def check_variables(chat_template: str | Mapping[str, str], given: Mapping[str, Any] | None, option: str) -> None:
    """Raise InputError for variables that no chat template is given, or that this one, or these, never read."""
    known = variables_read(chat_template) if given else set()
    for name in given or ():
        if name in _RESERVED:
            raise InputError(f"`{option}` gives {name!r}, which is set by the trainer. Leave it out.")
        if name not in known:
            raise InputError(
                f"`{option}` gives {name!r}, which the chat template never reads. Leave it out, or correct the name."
            )


def variables_read(chat_template: str | Mapping[str, str]) -> set[str]:
    """The variables that a chat template, or any of several by name, reads without setting them itself.

    Raises:
        InputError: It is no Jinja template.
    """
    from jinja2 import TemplateError
    from jinja2.meta import find_undeclared_variables
    from transformers.utils.chat_template_utils import _compile_jinja_template

    sources = list(chat_template.values()) if isinstance(chat_template, Mapping) else [chat_template]
    if not sources or not all(isinstance(source, str) for source in sources):
        raise InputError("the chat template is no text")
    try:
        parsed = [_compile_jinja_template(source).environment.parse(source) for source in sources]
    except TemplateError as error:
        raise InputError(f"the chat template is no Jinja template: {error}") from error
    return set().union(*map(find_undeclared_variables, parsed))


class ChatTemplate:
    """A tokenizer's chat template with its variables.

    Args:
        tokenizer: With a chat template.
        kwargs: Further variables, such as `{"enable_thinking": False}`; those that the template names are given.
    """

    def __init__(self, tokenizer: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        source = str(tokenizer.chat_template)
        variables = {**(kwargs or {}), "strftime_now": strftime_now}
        self.kwargs = {name: value for name, value in variables.items() if name in source}

    def render(self, messages: Sequence[Any], tools: Any = None, generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Raises:
            InputError: The template refuses it.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=None if not tools else list(tools),
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self.kwargs,
            )
        except Exception as error:  # each template refuses in its own way
            roles = [m["role"] for m in messages]
            raise InputError(f"the chat template refuses the roles {roles}: {error}") from error

    def prepare(self, messages: Sequence[Any], tools: Any = None, need_tools: bool = True) -> Messages:
        """The messages in the form in which this template writes all of what they say.

        They stay as they are wherever the template can write them. Else content parts become text or text becomes
        parts, arguments of tool calls that are JSON text become objects or objects JSON text, null contents become
        empty, and empty ones beside tool calls null.

        Args:
            messages: A conversation.
            tools: The tools that go with it.
            need_tools: Whether a template that leaves the tools or whole messages out is an error.

        Raises:
            InputError: The template refuses the messages, or leaves messages, tools or tool calls out.
        """
        given = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
        prepared, text = self._written(given, tools)
        if any(_of_tool(m) and str(m["content"]) in text for m in prepared):
            raise InputError("the chat template writes a tool's result as Python; give it as text (JSON)")
        if tools and need_tools and not self.writes_tools(prepared, tools, text):
            raise InputError(
                "the chat template does not write the `tools` of this row, so the model would never see them. Give a "
                "template that does (`chat_template`), or name another column with `columns.tools`"
            )
        lost = self.lost(prepared, text, tools) if need_tools else []
        if lost:
            raise InputError(
                f"the chat template writes nothing of message {lost[0]} ({prepared[lost[0]]['role']}), so the model "
                "would never see it. Give a template that does (`chat_template`), or leave such messages out"
            )
        return prepared

    def writes_tools(self, messages: Messages, tools: Any, text: str | None = None) -> bool:
        """Whether the template makes anything of `tools`."""
        return self._try(messages, None) != (self.render(messages, tools) if text is None else text)

    def _written(self, given: Messages, tools: Any) -> tuple[Messages, str]:
        """(the first form of the messages that is written rightly, its text): as few changes as possible."""
        needed: dict[Callable[[Any], Any], Callable[[Messages, str, Any], bool]] = {
            _flat: self._mistakes_parts,
            _parsed: self._mistakes_arguments,
            _filled: self._mistakes_null,
            _listed: self._mistakes_text,
            _dumped: _never,
            _nulled: _never,
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
                    unwritten = "the chat template does not write tool calls. Give one that does (`chat_template`)"
                elif not any(needed[change](form, text, tools) for change in changes if change not in chosen):
                    return form, text
        if unwritten is not None:
            raise InputError(unwritten)
        raise refusal or InputError("the chat template does not write these messages")

    def _try(self, messages: Messages, tools: Any) -> str | None:
        try:
            return self.render(messages, tools)
        except InputError:
            return None

    def _mistakes_parts(self, form: Messages, text: str, tools: Any) -> bool:
        """Whether one part of text is not written as that text is, by a template that takes text."""
        plain = [_flat(m) for m in form]
        single = [m | {"content": [{"type": "text", "text": f["content"]}]} if m != f else m
                  for m, f in zip(form, plain, strict=True)]  # fmt: skip
        as_text = self._try(plain, tools)
        if as_text is None or (self.lost(plain, as_text, tools) and not self.lost(form, text, tools)):
            return False
        return self._try(single, tools) != as_text

    def _mistakes_text(self, form: Messages, text: str, tools: Any) -> bool:
        """Whether text that is not written would be as a part."""
        if not self.lost(form, text, tools):
            return False
        parts = [_listed(m) for m in form]
        as_parts = self._try(parts, tools)
        if as_parts is None or self.lost(parts, as_parts, tools):
            return False
        written = (write(part) for m in parts for part in m.get("content") or () for write in (str, json.dumps))
        return not any(whole in as_parts for whole in written)  # as Python or JSON writes them

    def lost(self, form: Messages, text: str, tools: Any) -> list[int]:
        """The messages of whose content nothing is written; text beside a tool call may be left out."""
        said = [i for i, m in enumerate(form) if not any(m.get(key) for key in CALLS)]
        said = [i for i in said if any(piece.strip() not in text for piece in _pieces(form[i]))]
        if not said:
            return []
        marks = {i: f"{_MARK}{i}x" for i in said}
        marked = self._try([_saying(m, marks[i]) if i in marks else m for i, m in enumerate(form)], tools)
        return [] if marked is None else [i for i in said if marks[i].casefold() not in marked.casefold()]

    def _loses_calls(self, form: Messages, text: str, tools: Any) -> bool:
        """Whether the tool calls of some message are not written."""
        for i, message in enumerate(form):
            bare = _without_calls(message)
            if any(message.get(key) for key in CALLS) and self._try([*form[:i], bare, *form[i + 1 :]], tools) == text:
                return True
        return False

    def _mistakes_arguments(self, form: Messages, text: str, tools: Any) -> bool:
        """Whether JSON text is put into JSON once more."""
        return any(json.dumps(a, ensure_ascii=False) in text or json.dumps(a) in text for a in _texts(form))

    def _mistakes_null(self, form: Messages, text: str, tools: Any) -> bool:
        """Whether a null content is written as `None`."""
        marked = self._try([m | {"content": _MARK} if _filled(m) != m else m for m in form], tools)
        return marked is not None and _MARK in marked and marked.replace(_MARK, "None") == text


def _of_tool(message: Mapping[str, Any]) -> bool:
    """Whether a content is an object, a truth value or a list of other things than parts, as tools return them."""
    content = message.get("content")
    return isinstance(content, Mapping | list | bool) and not _is_parts(content)


def _is_parts(content: Any) -> bool:
    if not isinstance(content, list) or not content:
        return False
    return all(isinstance(part, Mapping) and part.get("type") == "text" for part in content)


def _flat(message: dict[str, Any]) -> dict[str, Any]:
    """Content parts as one text, as vLLM joins them."""
    content: Any = message.get("content")
    return message | {"content": "\n".join(part["text"] for part in content)} if _is_parts(content) else message


def _listed(message: dict[str, Any]) -> dict[str, Any]:
    """A text as the one part of a content."""
    content = message.get("content")
    return _saying(message | {"content": [content]}, content) if isinstance(content, str) else message


def _saying(message: dict[str, Any], text: str) -> dict[str, Any]:
    """The message with another text in place of its own, or of its parts."""
    as_parts = isinstance(message.get("content"), list)
    return message | {"content": [{"type": "text", "text": text}] if as_parts else text}


def _pieces(message: Mapping[str, Any]) -> list[str]:
    """The texts in a content."""
    content: Any = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content] if _is_parts(content) else []


def _nulled(message: dict[str, Any]) -> dict[str, Any]:
    """No content beside tool calls in place of an empty one."""
    return message | {"content": None} if message.get("content") == "" and message.get("tool_calls") else message


def _never(form: Messages, text: str, tools: Any) -> bool:
    """No mistake: for changes that are only made where the template refuses, or leaves tool calls out."""
    return False


def _filled(message: dict[str, Any]) -> dict[str, Any]:
    """An empty content in place of none."""
    return message if message.get("content") is not None else message | {"content": ""}


def _parsed(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments of tool calls as objects where they are JSON text."""
    return _with_arguments(message, _as_object)


def _dumped(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments of tool calls as JSON text where they are objects."""
    return _with_arguments(message, lambda a: json.dumps(a, ensure_ascii=False) if isinstance(a, Mapping) else None)


def _with_arguments(message: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    return message | {"tool_calls": [_changed_call(c, change) for c in calls]} if isinstance(calls, list) else message


def _changed_call(call: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _changed_call(call["function"], change)}
    value = change(call.get("arguments"))
    return call if value is None else {**call, "arguments": value}


def _texts(messages: Messages) -> list[str]:
    """Arguments of tool calls that are objects as JSON text."""
    given = [m.get("tool_calls") for m in messages]
    calls = [call for listed in given if isinstance(listed, list) for call in listed if isinstance(call, Mapping)]
    inner = [call["function"] if isinstance(call.get("function"), Mapping) else call for call in calls]
    return [c["arguments"] for c in inner if _as_object(c.get("arguments")) is not None]


def _as_object(arguments: Any) -> dict[str, Any] | None:
    if not isinstance(arguments, str):
        return None
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _without_calls(message: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in message.items() if k not in CALLS}
