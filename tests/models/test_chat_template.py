"""Rows are rendered as by plain transformers, or are refused."""

import json
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_pl.models.chat import encode_conversation, encode_prompt
from rlhf_pl.models.chat_template import ChatTemplate, check_template_kwargs
from rlhf_pl.utils.errors import InputError
from tests import chat_templates
from tests.conftest import make_tokenizer

TOKENIZER = make_tokenizer()
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    for name, properties in (("weather", {"city": {"type": "string"}}), ("time", {"zone": {"type": "number"}}))
]
ASK = {"role": "user", "content": "Weather in Paris?"}
RESULT = {"role": "tool", "content": "22", "name": "weather"}


def tokenizer(name: str) -> Any:
    copied = deepcopy(TOKENIZER)
    copied.chat_template = getattr(chat_templates, name)
    return copied


def call(arguments: Any, content: Any = None) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


def plain(name: str, messages: list[Any], prompt: bool = True, **variables: Any) -> str:
    return tokenizer(name).apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **variables)


def prompt_text(name: str, messages: list[Any], tools: Any = None, **variables: Any) -> str:
    return TOKENIZER.decode(encode_prompt(tokenizer(name), messages, tools, variables))


def trained_texts(name: str, messages: list[Any], every: bool = True, **options: Any) -> list[str]:
    """Texts of the consecutive tokens to train on."""
    ids, mask = encode_conversation(tokenizer(name), messages, [1, 2], every, **options)
    runs: list[list[int]] = [[]]
    for token, is_trained in zip(ids, mask, strict=True):
        if is_trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [TOKENIZER.decode(run) for run in runs if run]


@pytest.mark.parametrize("name", ["QWEN", "LLAMA"])
def test_tools_calls_and_results_are_written_as_by_transformers(name: str) -> None:
    messages = [ASK, call({"city": "Paris"}), RESULT]
    text = prompt_text(name, messages, TOOLS)
    assert text == plain(name, messages, tools=TOOLS)
    assert '{"city": "Paris"}' in text
    assert '"name": "weather"' in text
    assert "22" in text


def test_null_contents_stay_null_if_the_template_needs_them() -> None:
    messages = [ASK, call('{"city": "Paris"}'), RESULT]
    assert prompt_text("DEEPSEEK", messages) == plain("DEEPSEEK", messages)
    assert "<calls>weather\n" in prompt_text("DEEPSEEK", messages)


def test_arguments_as_json_text_are_not_encoded_twice() -> None:
    """OpenAI's format has arguments as JSON text."""
    as_text, as_object = [ASK, call('{"city": "Köln"}'), RESULT], [ASK, call({"city": "Köln"}), RESULT]
    assert "\\" in plain("QWEN", as_text, tools=TOOLS)
    assert prompt_text("QWEN", as_text, TOOLS) == plain("QWEN", as_object, tools=TOOLS)
    assert "Köln" in prompt_text("QWEN", as_text, TOOLS)


def test_content_parts_become_text_only_for_templates_without_parts() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]}]
    assert prompt_text("PARTS", parts) == plain("PARTS", parts) == "<|user|>OneTwo<|end|><|assistant|>"
    for name in ("PLAIN", "PRINTING", "QWEN", "GEMMA"):
        assert prompt_text(name, parts) == plain(name, [{"role": "user", "content": "One\nTwo"}])


def test_texts_become_parts_for_templates_that_only_write_parts() -> None:
    """Such templates silently omit text."""
    conversation = [{"role": "system", "content": [{"type": "text", "text": "Be kind."}]}, ASK]
    expected = "<|system|>Be kind.<|end|><|user|>Weather in Paris?<|end|><|assistant|>"
    assert "Weather" not in plain("PARTS_ALONE", conversation)
    assert prompt_text("PARTS_ALONE", conversation) == expected
    assert prompt_text("PARTS_ALONE", [{"role": "system", "content": "Be kind."}, ASK]) == expected


def test_empty_contents_and_objects_are_converted_for_templates_of_calls() -> None:
    """DeepSeek's template recognises calls by a null content, and concatenates arguments as text."""
    expected = plain("DEEPSEEK", [ASK, call('{"city": "Köln"}'), RESULT])
    for content in (None, ""):
        for arguments in ('{"city": "Köln"}', {"city": "Köln"}):
            assert prompt_text("DEEPSEEK", [ASK, call(arguments, content), RESULT]) == expected


@pytest.mark.parametrize(
    ("name", "messages", "tools", "message"),
    [
        ("PLAIN", [ASK], TOOLS, "does not write the `tools`"),
        ("PRINTING", [ASK, call({}), RESULT], None, "does not write tool calls"),
        ("PRINTING", [ASK, call({}, "I look."), RESULT], None, "does not write tool calls"),
        ("PLAIN", [ASK, call({}), RESULT], None, "does not write tool calls"),
        ("DEEPSEEK", [ASK, call("{}"), RESULT, call("{}", "I look."), RESULT], None, "does not write tool calls"),
        ("QWEN", [{"role": "developer", "content": "Be kind."}, ASK], None, r"nothing of message 0 \(developer\)"),
        ("DEEPSEEK", [{"role": "system", "content": "Be kind."}, ASK], None, r"nothing of message 0 \(system\)"),
        ("PRINTING", [ASK, RESULT | {"content": {"temp": 22}}], None, "writes a tool's result as Python"),
        ("PRINTING", [ASK, RESULT | {"content": True}], None, "writes a tool's result as Python"),
        ("LLAMA", [ASK, call({}) | {"tool_calls": call({})["tool_calls"] * 2}], None, "only supports single tool"),
        ("GEMMA", [{"role": "system", "content": "Be kind."}, ASK], None, "System role not supported"),
        ("GEMMA", [ASK, ASK], None, "must alternate"),
    ],
)
def test_messages_that_the_template_cannot_write_are_refused(
    name: str, messages: Any, tools: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        encode_prompt(tokenizer(name), messages, tools)


def test_results_that_are_objects_are_passed_to_templates_that_support_them() -> None:
    messages = [ASK, call({}), RESULT | {"content": {"temp": 22}}]
    assert prompt_text("LLAMA", messages, TOOLS) == plain("LLAMA", messages, tools=TOOLS)


def test_template_variables_are_passed_and_wrong_ones_are_refused() -> None:
    assert prompt_text("THINKING", [ASK], enable_thinking=False) == plain("THINKING", [ASK], enable_thinking=False)
    assert prompt_text("THINKING", [ASK], enable_thinking=False).endswith("<think>\n\n</think>\n\n")
    check_template_kwargs(tokenizer("THINKING"), {"enable_thinking": False}, "data.chat_template_kwargs")
    wrong = [(name, "never reads") for name in ("enable_thinkin", "think", "role", "m")]
    for name, message in (*wrong, ("tools", "the trainer sets")):
        with pytest.raises(InputError, match=f"`data.chat_template_kwargs` sets '{name}', which .*{message}"):
            check_template_kwargs(tokenizer("THINKING"), {name: 1}, "data.chat_template_kwargs")


def test_calls_are_trained_on_with_their_eos_and_weights_are_respected() -> None:
    messages = [ASK, call({"city": "Paris"}), RESULT, {"role": "assistant", "content": "22 degrees."}]
    response = '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|end|>'
    # the generation prompt of this template includes the newline before the call
    assert trained_texts("QWEN", messages, tools=TOOLS) == [response.lstrip("\n"), "22 degrees.<|end|>"]
    messages[1]["weight"] = 0
    assert trained_texts("QWEN", messages, tools=TOOLS) == ["22 degrees.<|end|>"]
    messages[3]["weight"] = 0
    assert trained_texts("QWEN", messages, tools=TOOLS) == []
    assert trained_texts("QWEN", [*messages[:3], messages[3] | {"weight": 1.0}], tools=TOOLS) == ["22 degrees.<|end|>"]


def test_a_response_without_a_prompt_is_refused() -> None:
    response = {"role": "assistant", "content": "Hello."}
    with pytest.raises(InputError, match="message 0 is a response without a prompt; give it `weight: 0`"):
        trained_texts("QWEN", [response, ASK, response])
    assert trained_texts("QWEN", [response | {"weight": 0}, ASK, response]) == ["Hello.<|end|>"]


def test_thoughts_are_trained_on_as_the_template_writes_them() -> None:
    response = {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}
    assert trained_texts("THINKING", [ASK, response]) == ["<think>\nTwo and two.\n</think>\n\nFour.<|end|>"]
    conversation = [ASK, response, ASK, response]
    with pytest.raises(InputError, match=r"message 1 differently when more messages follow; .*loss_on: last"):
        trained_texts("THINKING", conversation)
    assert trained_texts("THINKING", conversation, every=False) == ["<think>\nTwo and two.\n</think>\n\nFour.<|end|>"]
    conversation[1] = response | {"weight": 0}
    assert trained_texts("THINKING", conversation) == ["<think>\nTwo and two.\n</think>\n\nFour.<|end|>"]
    closed = {"chat_template_kwargs": {"enable_thinking": False}}
    assert trained_texts("THINKING", [ASK, {"role": "assistant", "content": "Four."}], **closed) == ["Four.<|end|>"]


def test_a_conversation_without_the_thought_that_its_prompt_opens_is_refused() -> None:
    with pytest.raises(InputError, match="starts message 1 differently"):
        trained_texts("DEEPSEEK", [ASK, {"role": "assistant", "content": "Four."}])


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=8).filter(str.strip)
VALUE = st.none() | st.integers(-9, 9) | TEXT | st.lists(st.none() | TEXT, max_size=2)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.tuples(TEXT, st.dictionaries(TEXT, VALUE, max_size=2)), min_size=1, max_size=3), st.booleans())
def test_any_conversation_with_calls_is_written_as_by_transformers(turns: Any, as_text: bool) -> None:
    messages: list[Any] = []
    for text, arguments in turns:
        messages += [{"role": "user", "content": text}, call(arguments), RESULT | {"content": text}]
    expected = plain("QWEN", messages, tools=TOOLS)
    given_form = deepcopy(messages)
    for message in given_form[1::3] if as_text else []:
        function = message["tool_calls"][0]["function"]
        function["arguments"] = json.dumps(function["arguments"])
    ids = encode_prompt(tokenizer("QWEN"), given_form, TOOLS)
    assert ids == tokenizer("QWEN")(expected, add_special_tokens=False)["input_ids"]


def test_parts_that_are_printed_as_python_are_refused() -> None:
    """A template that slices texts prints a list of one part completely, as Python."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'][:2] }}<|end|>{% endfor %}"
    with pytest.raises(InputError, match=r"writes nothing of message 0 \(user\)"):
        ChatTemplate(tokenizer).prepare([{"role": "user", "content": "Hello there"}])
