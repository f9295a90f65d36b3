"""Rows as token ids: several at a time, and for large data sets once a machine."""

import hashlib
import inspect
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from rlhf_pl.data.files import MAX_PROBLEMS, list_problems
from rlhf_pl.data.token_cache import cached_table
from rlhf_pl.models.chat import encode_prompt
from rlhf_pl.models.chat_template import ChatTemplate
from rlhf_pl.models.rendering import Renderer
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.run_date import dates_in

MIN_KEPT = 10_000  # rows; to look fewer up would take about as long as to tokenise them
_WRITERS = (encode_prompt, ChatTemplate, Renderer)  # in whose modules texts and ids are made
_TOGETHER = 64  # rows that a thread takes at a time
_MOST_THREADS = 8


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=_Named)


@dataclass(frozen=True)
class Recipe:
    """What token ids are made of, the rows aside.

    Args:
        tokenizer: With its chat template.
        settings: Options that change the ids, as plain values.
        option: The option that names the source of the rows, for errors.
        threads: Whether several threads may use the tokenizer at a time.
    """

    tokenizer: Any
    settings: Any
    option: str
    threads: bool = True

    @property
    def is_fast(self) -> bool:
        """Whether the tokenizer is one in Rust, which computes beside Python and tells all that it is made of."""
        return bool(getattr(self.tokenizer, "is_fast", False))


def token_table(
    rows: Sequence[Row],
    encode: Callable[[Row], Sequence[Sequence[int]]],
    columns: Sequence[str],
    recipe: Recipe,
    content: Callable[[Row], Any],
) -> pa.Table:
    """Token ids of all rows as a table: a row each, whose columns are lists of int32.

    Tokenizers in Rust run in as many threads as there are cores, up to 8. A table of 10,000 rows or more is kept on
    this machine (`token_cache`) under a key of all that it is made of.

    Args:
        rows: What is tokenised.
        encode: Gives a row's numbers, one sequence for each column. Called in threads.
        columns: Their names.
        recipe: What else the ids are made of.
        content: All of a row that `encode` looks at, as JSON has it.

    Raises:
        InputError: `encode` refuses rows: up to 10 are listed by their names.
    """

    def make() -> pa.Table:
        return _encoded(rows, encode, columns, recipe)

    if len(rows) < MIN_KEPT or not recipe.is_fast:
        return make()
    found = cached_table(cache_key(rows, columns, recipe, content), make)
    fits = len(found) == len(rows) and found.schema.equals(_schema(columns))
    return found if fits else make()


def token_lists(table: pa.Table, column: str) -> Iterator[np.ndarray]:
    """A column of a `token_table`, row by row: views of one buffer, each of shape (tokens,), int32."""
    for chunk in table[column].chunks:
        ends, values = chunk.offsets.to_numpy(), chunk.values.to_numpy()
        for start, end in itertools.pairwise(ends):
            yield values[start:end]


def cache_key(rows: Sequence[Row], columns: Sequence[str], recipe: Recipe, content: Callable[[Row], Any]) -> str:
    """A hash of tokenizer, template, settings, the code that reads them, and the rows in their order."""
    tokenizer = recipe.tokenizer
    made_of = {
        "code": [inspect.getsource(sys.modules[of.__module__]) for of in _WRITERS],
        "versions": [version(name) for name in ("transformers", "tokenizers", "jinja2")],
        "tokenizer": [type(tokenizer).__name__, tokenizer.special_tokens_map],
        "template": tokenizer.chat_template,
        "dates": dates_in(str(tokenizer.chat_template)),
        "settings": recipe.settings,
        "columns": list(columns),
    }
    digest = hashlib.sha256(json.dumps(made_of, default=repr).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for row in rows:
        digest.update(json.dumps(content(row), default=repr).encode() + b"\n")
    return digest.hexdigest()[:32]


def _schema(columns: Sequence[str]) -> pa.Schema:
    return pa.schema([(name, pa.list_(pa.int32())) for name in columns])


Part = tuple[pa.Table, list[tuple[str, str]]]


def _encoded(
    rows: Sequence[Row], encode: Callable[[Row], Sequence[Sequence[int]]], columns: Sequence[str], recipe: Recipe
) -> pa.Table:
    schema = _schema(columns)

    def part(start: int) -> Part:
        """Some rows' ids, and what is wrong with others of them."""
        found: list[Sequence[Sequence[int]]] = []
        wrong: list[tuple[str, str]] = []
        for row in rows[start : start + _TOGETHER]:
            try:
                found.append(encode(row))
            except InputError as error:
                wrong.append((row.name, str(error)))
                if len(wrong) == MAX_PROBLEMS:
                    break
        lists = [pa.array([numbers[i] for numbers in found], field.type) for i, field in enumerate(schema)]
        return pa.Table.from_arrays(lists, schema=schema), wrong

    tables: list[pa.Table] = []
    problems: list[tuple[str, str]] = []
    for table, wrong in _in_threads(part, range(0, len(rows), _TOGETHER), recipe):
        tables.append(table)
        problems += wrong[: MAX_PROBLEMS - len(problems)]
        if len(problems) == MAX_PROBLEMS:
            break
    if problems:
        raise InputError(f"`{recipe.option}`: rows that can't be rendered:\n{list_problems(problems)}")
    return pa.concat_tables([schema.empty_table(), *tables]).combine_chunks()


def _in_threads(work: Callable[[int], Part], starts: Sequence[int], recipe: Recipe) -> Iterator[Part]:
    """What `work` gives for each start, in their order."""
    threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS, len(starts) - 1)
    if threads < 2 or not (recipe.is_fast and recipe.threads):
        yield from map(work, starts)
        return
    yield work(starts[0])  # alone: the first call sets a tokenizer up
    pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenise")
    try:
        yield from pool.map(work, starts[1:])
    finally:
        pool.shutdown(cancel_futures=True)
