import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_pl.data.files import read_rows
from rlhf_pl.data.prompts import Prompt, load_prompts, select_prompts, take_prompts, tokenize_prompts
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError

Write = Callable[..., str]
ROWS = [{"prompt_id": "a", "prompt": "Hi", "answer": 1}, {"prompt_id": "b", "prompt": "Ho", "answer": 2}]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_all_file_formats_give_the_same_prompts(write_jsonl: Write, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    with (tmp_path / "p.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    expected = [Prompt("a", user("Hi"), {"answer": 1}), Prompt("b", user("Ho"), {"answer": 2})]
    assert load_prompts(write_jsonl(ROWS)) == expected
    assert load_prompts(str(tmp_path / "p.json")) == expected
    assert load_prompts(str(tmp_path / "p.parquet")) == expected
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert load_prompts(str(tmp_path / "lines.json")) == expected
    (tmp_path / "bom.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, ROWS)))
    assert load_prompts(str(tmp_path / "bom.jsonl")) == expected
    as_text = [Prompt(p.prompt_id, p.messages, {"answer": str(p.columns["answer"])}) for p in expected]
    assert load_prompts(str(tmp_path / "p.csv")) == as_text


def test_a_response_at_the_end_of_messages_is_dropped(write_jsonl: Write) -> None:
    chat = [*user("Hi"), {"role": "assistant", "content": "Hello"}]
    assert load_prompts(write_jsonl([{"messages": chat}]))[0].messages == user("Hi")
    longer = [*chat, *user("Bye"), {"role": "assistant", "content": "See you"}]
    assert load_prompts(write_jsonl([{"messages": longer}]))[0].messages == longer[:3]


def test_columns_are_mapped(write_jsonl: Write) -> None:
    rows = [{"id": 7, "question": "Hi", "answer": 1}]
    prompt = load_prompts(write_jsonl(rows), {"prompt": "question", "prompt_id": "id"}, system_prompt="Be brief.")[0]
    assert prompt == Prompt("7", [{"role": "system", "content": "Be brief."}, *user("Hi")], {"answer": 1})


def test_every_prompt_has_the_same_columns(write_jsonl: Write) -> None:
    prompts = load_prompts(write_jsonl([{"prompt": "a", "key": 1}, {"prompt": "b", "other": 2}]))
    assert [dict(p.columns) for p in prompts] == [{"key": 1, "other": None}, {"key": None, "other": 2}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "Hi"}, "no column `prompt` or `messages`; found text"),
        ({"prompt": "  "}, "`prompt` is empty"),
        ({"prompt": 3}, "expected text or a list of messages, found int"),
        ({"prompt": None}, "found NoneType"),
        ({"prompt": []}, "the message list is empty"),
        ({"prompt": [{"role": "user", "content": ""}]}, "message 0 (user) is empty"),
        ({"messages": [{"role": "assistant", "content": "Ho"}]}, "the message list holds only a response"),
        ({"prompt": "Hi", "prompt_id": 1.5}, "`prompt_id` is 1.5"),
        (["Hi"], "found list"),
    ],
)
def test_invalid_rows_are_named(write_jsonl: Write, row: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        load_prompts(write_jsonl([{"prompt": "fine"}, row]))
    assert "line 2" in str(error.value)
    assert message in str(error.value)


def test_up_to_ten_problems_are_listed(write_jsonl: Write) -> None:
    with pytest.raises(InputError) as error:
        load_prompts(write_jsonl([{"prompt": i} if i % 2 else {"prompt": ""} for i in range(30)]))
    assert str(error.value).count("\n  line ") == 10
    with pytest.raises(InputError, match="line 1 to line 10 and perhaps further: `prompt` is empty"):
        load_prompts(write_jsonl([{"prompt": ""}] * 30))


def test_invalid_files_are_refused(write_jsonl: Write, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": \n')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "broken.parquet").write_text("no")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "Grüße"}'.encode("latin-1"))
    (tmp_path / "short.csv").write_text("prompt_id,prompt\na\n")
    (tmp_path / "other.txt").write_text("Hi")
    for name, message in {
        "missing.jsonl": "no file",
        "broken.jsonl": "line 2: not JSON",
        "broken.json": "is not JSON",
        "object.json": "expected a list",
        "broken.parquet": "not a readable Parquet file",
        "empty.jsonl": "has no rows",
        "latin.jsonl": "not UTF-8",
        "short.csv": "line 2: found 1 fields; expected 2",
        "other.txt": "has none of the suffixes",
    }.items():
        with pytest.raises(InputError, match=message):
            load_prompts(str(tmp_path / name))
    with pytest.raises(InputError, match="as in line 1; expected a unique id"):
        load_prompts(write_jsonl([ROWS[0], ROWS[0]]))
    with pytest.raises(InputError, match="has unknown keys"):
        load_prompts(write_jsonl(ROWS), {"question": "prompt"})


def test_long_prompts_are_dropped_and_counted(source: ModelSource) -> None:
    prompts = [Prompt("short", user("Hi")), Prompt("long", user("Hi " * 100))]
    kept, dropped = tokenize_prompts(prompts, source.tokenizer, 20)
    assert ([p.prompt_id for p in kept], dropped) == (["short"], 1)
    assert source.tokenizer.decode(kept[0].token_ids) == "<s><|user|>Hi<|end|><|assistant|>"


def test_rounds_use_every_prompt_before_one_is_repeated() -> None:
    prompts = [Prompt(f"p{i}", user("Hi")) for i in range(12)]
    rounds = [[p.prompt_id for p in select_prompts(prompts, r, 4, seed=1)] for r in range(6)]
    assert sorted(rounds[0] + rounds[1] + rounds[2]) == sorted(p.prompt_id for p in prompts)
    assert rounds[:3] != rounds[3:]
    assert rounds[1] == [p.prompt_id for p in select_prompts(prompts, 1, 4, seed=1)]
    assert rounds[1] != [p.prompt_id for p in select_prompts(prompts, 1, 4, seed=2)]
    assert all(len(set(round_ids)) == 4 for round_ids in rounds)
    everything = select_prompts(prompts, 3, None, seed=1)
    assert sorted(p.prompt_id for p in everything) == sorted(p.prompt_id for p in prompts)


def test_parquet_is_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,500 rows in one row group: at most 1,024 of them are converted to Python objects at a time."""
    rows = [{"prompt_id": str(i), "prompt": f"Question {i}"} for i in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *arguments, **options: pytest.fail("read as a whole"))
    wheres = [where for where, _ in read_rows(str(tmp_path / "p.parquet"), "train", "data.prompts")]
    assert wheres == [f"row {i}" for i in range(2500)]
    found = load_prompts(str(tmp_path / "p.parquet"))
    assert [(p.prompt_id, p.messages) for p in found] == [(r["prompt_id"], user(r["prompt"])) for r in rows]


def test_prompts_follow_each_other_over_the_end_of_the_order() -> None:
    """Position 9 of 10: the last prompt of the first order, then the second order without it."""
    prompts = [Prompt(f"p{i}", user("Hi")) for i in range(10)]
    first, second = (take_prompts(prompts, start, 10, seed=1)[0] for start in (0, 10))
    assert first == select_prompts(prompts, 0, None, seed=1)
    taken, end = take_prompts(prompts, 9, 4, seed=1)
    rest = [p for p in second if p != first[9]]
    assert taken == [first[9], *rest[:3]]
    assert end == 10 + second.index(rest[2]) + 1
    assert len({p.prompt_id for p in take_prompts(prompts, 9, 99, seed=1)[0]}) == 10
