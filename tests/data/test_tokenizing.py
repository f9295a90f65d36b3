"""Token ids do not depend on the number of threads, and are cached until something that they depend on changes."""

import multiprocessing
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_pl.data import tokenizing
from rlhf_pl.data.prompts import Prompt, tokenize_prompts
from rlhf_pl.data.token_cache import cache_folder
from rlhf_pl.data.tokenizing import Recipe, cache_key, iterate_token_lists, make_token_table
from rlhf_pl.models.chat import encode_prompt
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils import run_date
from rlhf_pl.utils.errors import InputError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def tokenizer(llama: Path) -> Any:
    return ModelSource(str(llama)).tokenizer


def prompts(count: int, start: int = 0) -> list[Prompt]:
    texts = (f"What is {i} plus {i % 7}?" for i in range(start, start + count))
    return [Prompt(str(i), [{"role": "user", "content": text}]) for i, text in enumerate(texts)]


class Counted:
    """Encodes prompts and counts the calls."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.calls = tokenizer, 0

    def __call__(self, prompt: Prompt) -> list[list[int]]:
        self.calls += 1
        return [encode_prompt(self.tokenizer, prompt.messages)]


def table_of(rows: list[Prompt], encode: Counted, settings: Any = None) -> list[list[int]]:
    recipe = Recipe(encode.tokenizer, settings, "data.prompts")
    table = make_token_table(rows, encode, ["ids"], recipe, lambda prompt: [prompt.messages])
    return [ids.tolist() for ids in iterate_token_lists(table, "ids")]


@pytest.mark.parametrize("cores", [1, 4])
@pytest.mark.parametrize("kept", [10**9, 1])
def test_ids_equal_those_of_prompts_encoded_one_by_one(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, cores: int, kept: int
) -> None:
    monkeypatch.setattr(tokenizing.os, "sched_getaffinity", lambda process: range(cores))
    monkeypatch.setattr(tokenizing, "MIN_CACHED_ROWS", kept)
    rows = prompts(300)
    expected = [encode_prompt(tokenizer, p.messages) for p in rows]
    longest = sorted(set(map(len, expected)))[-2]
    for _ in range(2):  # the second time from the cache, if the table is cached
        found, too_long = tokenize_prompts(rows, tokenizer, longest)
        assert [list(p.token_ids) for p in found] == [ids for ids in expected if len(ids) <= longest]
        assert too_long == sum(len(ids) > longest for ids in expected) > 0
        assert all(isinstance(p.token_ids, array) and p.token_ids.itemsize == 4 for p in found)


@pytest.mark.parametrize("cores", [1, 4])
def test_the_first_ten_refused_rows_are_named_in_order(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr(tokenizing.os, "sched_getaffinity", lambda process: range(cores))
    wrong = {"200", "3", *map(str, range(230, 250))}

    class Refusing(Counted):
        def __call__(self, prompt: Prompt) -> list[list[int]]:
            if prompt.prompt_id in wrong:
                raise InputError(f"no {prompt.prompt_id}")
            return super().__call__(prompt)

    with pytest.raises(InputError, match=r"`data\.prompts`: rows that can't be rendered") as caught:
        table_of(prompts(300), Refusing(tokenizer))
    named = ["3", "200", *map(str, range(230, 238))]
    assert str(caught.value).splitlines()[1:11] == [f"  prompt_id '{name}': no {name}" for name in named]


def test_only_large_sets_are_cached(tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Counted(tokenizer)
    first = table_of(prompts(999), encode)
    assert encode.calls == 999
    assert not folder.exists()
    monkeypatch.setattr(tokenizing, "MIN_CACHED_ROWS", 100)
    assert table_of(prompts(999), encode) == table_of(prompts(999), encode) == first
    assert encode.calls == 2 * 999


def test_a_damaged_file_is_made_again(tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "MIN_CACHED_ROWS", 1)
    encode = Counted(tokenizer)
    expected = table_of(prompts(50), encode)
    (file,) = folder.glob("*.parquet")
    whole = file.read_bytes()
    for content in (whole[:-9], b"", whole.replace(b"\x00", b"\x01", 1)):
        file.write_bytes(content)
        assert table_of(prompts(50), encode) == expected
        assert file.read_bytes() == whole
    assert encode.calls == 4 * 50


def test_the_key_depends_on_everything_that_ids_depend_on(tokenizer: Any, llama: Path) -> None:
    rows = prompts(3)

    def key(of: Any = tokenizer, settings: Any = None, rows: list[Prompt] = rows) -> str:
        return cache_key(rows, ["ids"], Recipe(of, settings, "data.prompts"), lambda p: [p.messages, p.tools])

    def other(change: Callable[[Any], object]) -> Any:
        changed = ModelSource(str(llama)).tokenizer
        change(changed)
        return changed

    others = [
        key(other(lambda t: t.add_tokens(["plus"]))),
        key(other(lambda t: setattr(t, "chat_template", t.chat_template + " "))),
        key(other(lambda t: setattr(t, "bos_token", "</s>"))),
        key(settings={"enable_thinking": False}),
        key(rows=rows[::-1]),
        key(rows=rows[:2]),
        key(rows=[replace(rows[0], tools=[{"name": "a"}]), *rows[1:]]),
    ]
    assert key() == key(ModelSource(str(llama)).tokenizer)
    assert len({key(), *others}) == 1 + len(others)


def test_the_key_includes_the_date_in_the_format_of_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    dates = {"%d %b": "26 Nov", "%Y": "2026", "%c %f": "a moment"}
    monkeypatch.setattr(run_date, "strftime_now", dates.__getitem__)
    assert run_date.get_dates("{{ messages }}") == []
    plain = "{% if strftime_now is defined %}{{ strftime_now('%d %b') }}{{ strftime_now( \"%Y\" ) }}{% endif %}"
    assert run_date.get_dates(plain) == ["26 Nov", "2026"]
    assert run_date.get_dates("{% set form = '%Y' %}{{ strftime_now(form) }}") == ["a moment"]


def test_without_a_writable_folder_nothing_is_cached(
    tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "MIN_CACHED_ROWS", 1)
    folder.parent.write_text("a file")
    encode = Counted(tokenizer)
    assert table_of(prompts(50), encode) == table_of(prompts(50), encode)
    assert encode.calls == 100


def test_processes_of_one_machine_wait_for_the_first(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "MIN_CACHED_ROWS", 1)
    monkeypatch.setattr(tokenizing.os, "sched_getaffinity", lambda process: range(1))
    made = tmp_path / "made"

    class Slow(Counted):
        def __call__(self, prompt: Prompt) -> list[list[int]]:
            if prompt.prompt_id == "0":
                time.sleep(0.3)  # the other process starts meanwhile
                with made.open("a") as file:
                    file.write("x")
            return super().__call__(prompt)

    expected = table_of(prompts(20), Counted(tokenizer), settings="elsewhere")
    queue = multiprocessing.get_context("fork").SimpleQueue()
    processes = [
        multiprocessing.get_context("fork").Process(target=lambda: queue.put(table_of(prompts(20), Slow(tokenizer))))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    assert [queue.get() for _ in processes] == [expected] * 2
    for process in processes:
        process.join()
    assert made.read_text() == "x"
