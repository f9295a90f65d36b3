"""All loaders read messages in the same way: lists, JSON text, dialogues, tables with None under missing keys."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_pl.data.conversations import load_conversations
from rlhf_pl.data.preferences import load_preferences
from rlhf_pl.data.prompts import load_prompts, tokenize_prompts
from rlhf_pl.utils.errors import InputError
from tests.models.test_chat_template import RESULT, TOOLS, call, plain, tokenizer

Write = Callable[..., str]
SYSTEM, ASK = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
RESPONSE, OTHER = {"role": "assistant", "content": "Because."}, {"role": "assistant", "content": "No."}
HH = "\n\nHuman: Why?\n\nAssistant:"


def write(folder: Path, suffix: str, rows: list[dict[str, Any]], as_text: bool) -> str:
    """Write rows to a file, with lists as JSON text if `as_text`."""
    file = folder / f"rows.{suffix}"
    if as_text:
        rows = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    if suffix == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return str(file)


FORMATS = [("jsonl", False), ("jsonl", True), ("parquet", False), ("parquet", True), ("csv", True)]


@pytest.mark.parametrize(("suffix", "as_text"), FORMATS)
def test_every_file_format_gives_every_stage_the_same_messages(tmp_path: Path, suffix: str, as_text: bool) -> None:
    """Nested calls and tools: tables fill missing keys with None, which is removed."""
    rows: list[dict[str, Any]] = [
        {"messages": [SYSTEM, ASK, RESPONSE], "tools": TOOLS},
        {"messages": [ASK, call({"city": "Paris"}), RESULT, RESPONSE | {"weight": 0}], "tools": TOOLS},
        {"messages": [ASK, call({"zip": "7"}), RESULT, RESPONSE], "tools": []},
    ]
    file = write(tmp_path, suffix, rows, as_text)
    conversations = load_conversations(file)
    assert [c.messages for c in conversations] == [row["messages"] for row in rows]
    assert [c.tools for c in conversations] == [TOOLS, TOOLS, None]
    prompts = load_prompts(file)
    assert [p.messages for p in prompts] == [row["messages"][:-1] for row in rows]
    pairs = [
        {"chosen": [*row["messages"][:-1], call({"a": 1})], "rejected": [*row["messages"][:-1], OTHER]} for row in rows
    ]
    found = load_preferences(write(tmp_path, suffix, pairs, as_text)).pairs
    assert [p.messages for p in found] == [row["messages"][:-1] for row in rows]
    assert [p.responses for p in found] == [(call({"a": 1}), OTHER)] * 3
    assert [(p.chosen, p.rejected) for p in found] == [("", "No.")] * 3


def test_a_table_is_rendered_like_the_rows_it_was_made_of(tmp_path: Path) -> None:
    rows = [
        {"prompt": [ASK, call({"city": "Paris"}), RESULT], "tools": TOOLS},
        {"prompt": [ASK, call({"zip": "7"}), RESULT], "tools": TOOLS},
    ]
    prompts, _ = tokenize_prompts(load_prompts(write(tmp_path, "parquet", rows, False)), tokenizer("LLAMA"), 10_000)
    texts = [tokenizer("LLAMA").decode(p.token_ids) for p in prompts]
    assert texts == [plain("LLAMA", row["prompt"], tools=row["tools"]) for row in rows]
    (tmp_path / "exported.jsonl").write_text(
        "\n".join(json.dumps(row) for row in pa.Table.from_pylist(rows).select(["prompt"]).to_pylist())
    )
    again = load_prompts(str(tmp_path / "exported.jsonl"))
    assert [p.messages for p in again] == [row["prompt"] for row in rows]


def test_a_null_in_the_arguments_of_a_tool_call_is_kept(write_jsonl: Write) -> None:
    messages = [ASK, call({"city": "Paris", "unit": None}), RESULT]
    assert load_prompts(write_jsonl([{"prompt": messages}]))[0].messages == messages


def test_dialogues_are_the_same_messages_in_all_stages(write_jsonl: Write, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": HH, "response": " Because.", "chosen": " Because.", "rejected": " No."}] * 3
    file = write_jsonl([*rows, {**rows[0], "prompt": "Why?"}])
    assert [p.messages for p in load_prompts(file)] == [[ASK]] * 4
    report = "data.prompts: 3 rows are dialogues of Human and Assistant, read as messages (data.parse_dialogues: false"
    assert report in capsys.readouterr().out
    assert [c.messages[:-1] for c in load_conversations(file)] == [[ASK]] * 4
    assert [p.messages for p in load_preferences(file).pairs] == [[ASK]] * 4
    whole = write_jsonl([{"messages": HH + " Because.", "chosen": HH + " Because.", "rejected": HH + " No."}])
    assert load_prompts(whole)[0].messages == [ASK]
    assert load_conversations(whole)[0].messages == [ASK, RESPONSE]
    (pair,) = load_preferences(whole).pairs
    assert (pair.messages, *pair.responses) == ([ASK], RESPONSE, OTHER)


def test_whole_dialogues_with_a_prompt_column(write_jsonl: Write) -> None:
    row = {"prompt": "Why?", "response": HH + " Because.", "chosen": HH + " Because.", "rejected": HH + " No."}
    (pair,) = load_preferences(write_jsonl([row])).pairs
    assert (pair.messages, *pair.responses) == ([ASK], RESPONSE, OTHER)
    assert load_conversations(write_jsonl([row]))[0].messages == [ASK, RESPONSE]


def test_responses_to_a_dialogue_are_stripped_as_inside_a_dialogue(write_jsonl: Write) -> None:
    row = {"prompt": HH, "response": " Because.", "chosen": " Because.\n", "rejected": " No."}
    (pair,) = load_preferences(write_jsonl([row])).pairs
    assert (pair.messages, *pair.responses) == ([ASK], RESPONSE, OTHER)
    assert load_conversations(write_jsonl([row]))[0].messages == [ASK, RESPONSE]
    assert load_conversations(write_jsonl([row | {"prompt": "Why?"}]))[0].messages == [
        ASK,
        RESPONSE | {"content": " Because."},
    ]


def test_a_dialogue_and_other_text_as_a_pair_are_refused(write_jsonl: Write) -> None:
    row = {"chosen": HH + " Because.", "rejected": HH + " No.\n\nHuman: Thanks."}
    with pytest.raises(
        InputError, match="`chosen` is a dialogue that ends with a turn of Assistant, but `rejected` is not"
    ):
        load_preferences(write_jsonl([row]))


def test_responses_of_several_messages_follow_their_prompt(write_jsonl: Write) -> None:
    start = [call({"city": "Paris"}), RESULT]
    row = {"prompt": "Why?", "response": [*start, RESPONSE], "chosen": [*start, RESPONSE], "rejected": [*start, OTHER]}
    (pair,) = load_preferences(write_jsonl([row])).pairs
    assert (pair.messages, *pair.responses) == ([ASK, *start], RESPONSE, OTHER)
    assert load_conversations(write_jsonl([row]))[0].messages == [ASK, *start, RESPONSE]


@pytest.mark.parametrize("prompt", ["Why?", [ASK], [SYSTEM, ASK]])
def test_whole_conversations_with_a_prompt_column_have_the_prompt_once(write_jsonl: Write, prompt: Any) -> None:
    row = {"prompt": prompt, "response": [ASK, RESPONSE], "chosen": [ASK, RESPONSE], "rejected": [ASK, OTHER]}
    before = prompt if isinstance(prompt, list) else [ASK]
    (pair,) = load_preferences(write_jsonl([row])).pairs
    assert (pair.messages, *pair.responses) == (before, RESPONSE, OTHER)
    assert load_conversations(write_jsonl([row]))[0].messages == [*before, RESPONSE]
    row |= {"response": HH + " Because.", "chosen": HH + " Because.", "rejected": HH + " No."}
    assert load_preferences(write_jsonl([row])).pairs[0].messages == before
    assert load_conversations(write_jsonl([row]))[0].messages == [*before, RESPONSE]


def test_calls_as_json_text_without_a_prompt_are_refused(write_jsonl: Write) -> None:
    calls = [{key: value for key, value in call({"n": i}).items() if key != "content"} for i in range(2)]
    row = {"chosen": json.dumps(calls[0]), "rejected": json.dumps(calls[1])}
    with pytest.raises(InputError, match="no column `prompt`, and the responses have no common beginning"):
        load_preferences(write_jsonl([row]))


def test_columns_that_are_null_are_ignored(write_jsonl: Write) -> None:
    rows = [{"prompt": None, "response": None, "messages": [ASK, RESPONSE]}, {"prompt": "Why?", "response": "Because."}]
    rows[1]["messages"] = None
    file = write_jsonl(rows)
    assert [p.messages for p in load_prompts(file)] == [[ASK], [ASK]]
    assert [c.messages for c in load_conversations(file)] == [[ASK, RESPONSE], [ASK, RESPONSE]]


def test_json_text_in_a_table_keeps_its_nulls(tmp_path: Path) -> None:
    """The nulls were written by the user; they don't stand for missing keys."""
    schema = {"type": "object", "properties": {"city": {"type": "string", "default": None}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    messages = [ASK, call({"city": None}), RESULT]
    (prompt,) = load_prompts(write(tmp_path, "parquet", [{"messages": messages, "tools": tools}], True))
    assert (prompt.messages, prompt.tools) == (messages, tools)


def test_none_is_removed_from_tools_of_a_table_that_was_written_as_json(write_jsonl: Write) -> None:
    filled = json.loads(json.dumps(TOOLS))
    filled[0]["function"]["parameters"]["properties"]["zone"] = None
    filled[1]["function"]["parameters"]["properties"]["city"] = None
    assert load_prompts(write_jsonl([{"prompt": "Why?", "tools": filled}]))[0].tools == TOOLS


def test_messages_that_were_encoded_as_json_twice_are_read(write_jsonl: Write) -> None:
    assert load_prompts(write_jsonl([{"prompt": json.dumps(json.dumps([ASK]))}]))[0].messages == [ASK]
    for text in ('"Why?" she said.', '"Why?"', json.dumps(ASK) + " Explain this."):
        assert load_prompts(write_jsonl([{"prompt": text}]))[0].messages == [{"role": "user", "content": text}]


def test_prompts_that_end_with_a_response_are_reported(write_jsonl: Write, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl([{"chosen": HH + " Because."}])
    assert load_prompts(file, columns={"prompt": "chosen"})[0].messages[0]["content"] == HH + " Because."
    report = "data.prompts: one prompt looks like a dialogue that ends with a response: read as text. Name the column"
    assert report in capsys.readouterr().out
    assert load_prompts(file, columns={"messages": "chosen"})[0].messages == [ASK]


@pytest.mark.parametrize(
    "text",
    ["\n\nHuman: is how dialogues begin.", "Say it:" + HH, HH + " Because.\n\nWhat is wrong here?", "Human: Hi"],
)
def test_a_prompt_that_only_looks_like_a_dialogue_is_text(write_jsonl: Write, text: str) -> None:
    assert load_prompts(write_jsonl([{"prompt": text}]))[0].messages == [{"role": "user", "content": text}]


def test_dialogues_can_be_read_as_text(write_jsonl: Write, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl([{"prompt": HH, "response": "Because.", "chosen": "Because.", "rejected": "No."}])
    user = [{"role": "user", "content": HH}]
    assert load_prompts(file, parse_dialogues=False)[0].messages == user
    assert load_conversations(file, parse_dialogues=False)[0].messages[:-1] == user
    assert load_preferences(file, parse_dialogues=False).pairs[0].messages == user
    assert capsys.readouterr().out == ""


def test_responses_at_the_end_are_left_out_of_prompts_and_counted(
    write_jsonl: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": [ASK, RESPONSE]}, {"prompt": [ASK]}, {"messages": [ASK, RESPONSE, ASK, call({})]}]
    assert [p.messages for p in load_prompts(write_jsonl(rows))] == [[ASK], [ASK], [ASK, RESPONSE, ASK]]
    assert "data.prompts: 2 conversations end with a response, which is left out." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "[{'role': 'user', 'content': 'Hi'}]"}, "looks like messages, but is not JSON"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "content part of type `image`"),
        ({"prompt": [{"role": "user", "content": ["Hi"]}]}, "content part that is not an object with a `type`"),
        ({"prompt": [ASK, {"role": "assistant", "content": None}, ASK]}, "NoneType under `content`"),
        ({"prompt": [ASK, RESPONSE | {"weight": 0.5}, ASK]}, "has the weight 0.5, expected 1 (train on it) or 0"),
        ({"prompt": "Hi", "tools": "hammer"}, "`tools` is 'hammer'; expected a list of tools"),
        ({"prompt": [RESPONSE]}, "holds only a response"),
    ],
)
def test_invalid_rows_are_named(write_jsonl: Write, row: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        load_prompts(write_jsonl([{"prompt": "fine"}, row]))
    assert "line 2: " in str(error.value)
    assert message in str(error.value)


def test_a_tools_column_with_another_meaning_can_be_ignored(write_jsonl: Write) -> None:
    (prompt,) = load_prompts(write_jsonl([{"prompt": "Hi", "tools": "hammer"}]), {"tools": "none"})
    assert (prompt.tools, prompt.columns) == (None, {"tools": "hammer"})


def test_text_that_is_other_json_stays_text(write_jsonl: Write) -> None:
    texts = ["[1, 2]", '{"role": "admin"}', "[{", '{"a": 1}']
    assert [p.messages[0]["content"] for p in load_prompts(write_jsonl([{"prompt": t} for t in texts]))] == texts
    response = json.dumps({"role": "admin", "content": "x"})
    (conversation,) = load_conversations(write_jsonl([{"prompt": "Hi", "response": response}]))
    assert conversation.messages[-1] == {"role": "assistant", "content": response}


def test_rows_that_cannot_be_rendered_are_listed(write_jsonl: Write) -> None:
    rows = [{"prompt_id": "a", "prompt": [ASK]}, {"prompt_id": "b", "prompt": [SYSTEM, ASK]}]
    with pytest.raises(InputError, match=r"(?s)rows that can't be rendered:.*prompt_id 'b': .*System role not"):
        tokenize_prompts(load_prompts(write_jsonl(rows)), tokenizer("GEMMA"), 100)
