"""Every prompt file gives prompts or one clear error."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlhf_pl.data.prompts import load_prompts, tokenize_prompts
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError

FUZZ = settings(
    max_examples=150, derandomize=True, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(st.characters(exclude_categories=[]), max_size=20)  # half surrogates too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "name"]), st.sampled_from(["user", "system", "Hi"]) | JSON)
    | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": TEXT}),
    max_size=4,
)
ROWS = st.dictionaries(
    st.sampled_from(["prompt", "messages", "prompt_id", "answer", "tools"]) | TEXT,
    TEXT | MESSAGES | MESSAGES.map(json.dumps) | JSON,
    max_size=4,
)


def assert_accepted_or_refused(file: Path, source: ModelSource, columns: dict[str, str] | None = None) -> None:
    """Load, tokenize and write the prompts like a run; only an InputError that names the file may be raised."""
    try:
        prompts = load_prompts(str(file), columns)
        kept, _ = tokenize_prompts(prompts, source.tokenizer, 10_000)
    except InputError as error:
        refused: str | None = str(error)
    else:
        refused = None
    if refused is not None:
        assert "`data." in refused
        assert file.name in refused or "prompt_id" in refused
        assert refused.count("\n") <= 12
        return
    assert len({p.prompt_id for p in prompts}) == len(prompts) >= len(kept)
    for prompt in kept:
        stored = [prompt.prompt_id, json.dumps(prompt.messages, ensure_ascii=False, default=str),
                  json.dumps(dict(prompt.columns), ensure_ascii=False, default=str)]  # fmt: skip
        assert pa.array(stored, pa.string()).to_pylist() == stored
        assert prompt.token_ids


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_any_bytes(tmp_path: Path, source: ModelSource, suffix: str) -> None:
    @FUZZ
    @given(st.binary(max_size=300) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
    @example(b"")
    @example(b"\x00")
    @example(b"\xff\xfe" + '{"prompt": "Hi"}'.encode("utf-16-le"))
    @example(b"\xef\xbb\xbf" + b'{"prompt": "Hi"}')
    @example(b"[" * 100_000)
    @example(b'{"prompt": ' * 5000)
    @example(b'[{"prompt": "Hi"}')
    @example(b'{"prompt": "Hi"}\r\n\r\n{"prompt": NaN}')
    @example(b"PAR1PAR1")
    @example(b"prompt,prompt\na,b\n")
    @example(b'prompt\n"unclosed\n')
    def check(content: bytes) -> None:
        file = tmp_path / f"any{suffix}"
        file.write_bytes(content)
        assert_accepted_or_refused(file, source)

    check()


@FUZZ
@given(rows=st.lists(ROWS | JSON, min_size=1, max_size=5), as_lines=st.booleans())
@example(rows=[{"prompt": "\ud800"}], as_lines=True)
@example(rows=[{"prompt": "Hi", "answer": "\udfff"}], as_lines=True)
@example(rows=[{"prompt": "Hi", "prompt_id": 10**400}], as_lines=True)
@example(rows=[{"prompt": "Hi", "prompt_id": "a"}, {"prompt": "Ho", "prompt_id": "a"}], as_lines=True)
@example(rows=[{"prompt": "Hi"}, {"prompt": "Ho", "prompt_id": "row-0"}], as_lines=False)
@example(rows=[{"prompt": "\n\nHuman:\n\nHuman: Hi\n\nAssistant:"}], as_lines=True)
def test_any_json(tmp_path: Path, source: ModelSource, rows: list[Any], as_lines: bool) -> None:
    file = tmp_path / ("any.jsonl" if as_lines else "any.json")
    file.write_text("\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows))
    assert_accepted_or_refused(file, source)


@pytest.mark.parametrize("depth", [100, 300, 480, 700, 990, 3000])
def test_deep_rows(tmp_path: Path, source: ModelSource, depth: int) -> None:
    nested = '{"x": ' * depth + "1" + "}" * depth
    file = tmp_path / "deep.jsonl"
    for row in (f'{{"prompt": [{{"role": "user", "content": "Hi", "x": {nested}}}]}}',
                f'{{"prompt": "Hi", "tools": [{nested}]}}'):  # fmt: skip
        file.write_text(row)
        assert_accepted_or_refused(file, source)


@FUZZ
@given(rows=st.lists(ROWS, min_size=1, max_size=3), columns=st.dictionaries(TEXT | st.just("prompt"), TEXT, max_size=2))
def test_any_column_names(tmp_path: Path, source: ModelSource, rows: list[Any], columns: dict[str, str]) -> None:
    file = tmp_path / "any.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert_accepted_or_refused(file, source, columns)


@FUZZ
@given(
    header=st.lists(st.sampled_from(["prompt", "prompt_id", "answer", ""]), min_size=1, max_size=3),
    rows=st.lists(st.lists(st.text(max_size=10), max_size=4), max_size=4),
)
@example(header=["prompt"], rows=[["x" * 200_000]])
def test_any_csv(tmp_path: Path, source: ModelSource, header: list[str], rows: list[list[str]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    file = tmp_path / "any.csv"
    file.write_bytes(text.getvalue().encode("utf-8", "surrogatepass"))
    assert_accepted_or_refused(file, source)


@FUZZ
@given(
    columns=st.dictionaries(
        st.sampled_from(["prompt", "messages", "prompt_id", "answer"]),
        st.sampled_from(
            [
                pa.array(["a", "b"]),
                pa.array(["a", None]),
                pa.array([1, 2]),
                pa.array([b"a", b"\xff"]),
                pa.array([1.5, float("nan")]),
                pa.array([2**62, -(2**62)], pa.timestamp("ns")),
                pa.array([2**40, 0], pa.date64()),
                pa.array([[{"role": "user", "content": "Hi"}], []]),
                pa.array([[{"role": "user", "content": None}], None]),
                pa.array([{"a": 1}, {"a": 2}]),
                pa.array([None, None]),
                pa.array(["a", "a"]).dictionary_encode(),
                pa.array([10, 20], pa.decimal128(5, 2)),
            ]
        ),
        min_size=1,
    )
)
def test_any_parquet(tmp_path: Path, source: ModelSource, columns: dict[str, pa.Array]) -> None:
    file = tmp_path / "any.parquet"
    pq.write_table(pa.table(columns), file)
    assert_accepted_or_refused(file, source)
