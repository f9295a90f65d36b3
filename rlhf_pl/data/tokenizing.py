"""Tokenizes rows in threads, and caches the token ids of large data sets on this machine."""

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
from rlhf_pl.data.token_cache import load_or_make_table
from rlhf_pl.models.chat import encode_prompt
from rlhf_pl.models.chat_template import ChatTemplate
from rlhf_pl.models.rendering import Renderer
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.run_date import get_dates

MIN_CACHED_ROWS = 10_000  # for fewer rows, a cache look-up takes about as long as tokenizing
_ENCODERS = (encode_prompt, ChatTemplate, Renderer)  # the source of their modules is part of the cache key
_ROWS_PER_TASK = 64
_MAX_THREADS = 8


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=_Named)


@dataclass(frozen=True)
class Recipe:
    """Everything but the rows that token ids depend on.

    Args:
        tokenizer: The tokenizer, with its chat template.
        settings: Options that change the ids, as plain values.
        option: The option that names the source of the rows, for errors.
        threads: Whether several threads may use the tokenizer at the same time.
    """

    tokenizer: Any
    settings: Any
    option: str
    threads: bool = True

    @property
    def is_fast(self) -> bool:
        """Whether the tokenizer is implemented in Rust: it runs without the GIL and can be serialized."""
        return bool(getattr(self.tokenizer, "is_fast", False))


def make_token_table(
    rows: Sequence[Row],
    encode: Callable[[Row], Sequence[Sequence[int]]],
    columns: Sequence[str],
    recipe: Recipe,
    content: Callable[[Row], Any],
) -> pa.Table:
    """Tokenize all rows into a table, whose columns are lists of int32.

    Tokenizers in Rust run in as many threads as there are cores, up to 8. A table of 10,000 rows or more is cached on
    this machine (`token_cache`) under a key of everything that it depends on.

    Args:
        rows: The rows to tokenize.
        encode: Returns a sequence of numbers for each column of a row. Called in threads.
        columns: Names of the columns.
        recipe: Everything else that the ids depend on.
        content: Returns everything of a row that `encode` uses, as values that JSON can store.

    Raises:
        InputError: `encode` raises InputError: up to 10 rows are listed by name.
    """

    def make() -> pa.Table:
        return _encode_rows(rows, encode, columns, recipe)

    if len(rows) < MIN_CACHED_ROWS or not recipe.is_fast:
        return make()
    found = load_or_make_table(cache_key(rows, columns, recipe, content), make)
    fits = len(found) == len(rows) and found.schema.equals(_schema(columns))
    return found if fits else make()


def iterate_token_lists(table: pa.Table, column: str) -> Iterator[np.ndarray]:
    """Yield a column of a token table row by row: views of one buffer, each of shape (tokens,), int32."""
    for chunk in table[column].chunks:
        ends, values = chunk.offsets.to_numpy(), chunk.values.to_numpy()
        for start, end in itertools.pairwise(ends):
            yield values[start:end]


def cache_key(rows: Sequence[Row], columns: Sequence[str], recipe: Recipe, content: Callable[[Row], Any]) -> str:
    """A hash of the tokenizer, template, settings, code and rows that token ids depend on."""
    tokenizer = recipe.tokenizer
    inputs = {
        "code": [inspect.getsource(sys.modules[of.__module__]) for of in _ENCODERS],
        "versions": [version(name) for name in ("transformers", "tokenizers", "jinja2")],
        "tokenizer": [type(tokenizer).__name__, tokenizer.special_tokens_map],
        "template": tokenizer.chat_template,
        "dates": get_dates(str(tokenizer.chat_template)),
        "settings": recipe.settings,
        "columns": list(columns),
    }
    digest = hashlib.sha256(json.dumps(inputs, default=repr).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for row in rows:
        digest.update(json.dumps(content(row), default=repr).encode() + b"\n")
    return digest.hexdigest()[:32]


def _schema(columns: Sequence[str]) -> pa.Schema:
    return pa.schema([(name, pa.list_(pa.int32())) for name in columns])


Part = tuple[pa.Table, list[tuple[str, str]]]  # token ids, and (name, problem) of rows that can't be rendered


def _encode_rows(
    rows: Sequence[Row], encode: Callable[[Row], Sequence[Sequence[int]]], columns: Sequence[str], recipe: Recipe
) -> pa.Table:
    schema = _schema(columns)

    def encode_part(start: int) -> Part:
        encoded: list[Sequence[Sequence[int]]] = []
        invalid: list[tuple[str, str]] = []
        for row in rows[start : start + _ROWS_PER_TASK]:
            try:
                encoded.append(encode(row))
            except InputError as error:
                invalid.append((row.name, str(error)))
                if len(invalid) == MAX_PROBLEMS:
                    break
        lists = [pa.array([numbers[i] for numbers in encoded], field.type) for i, field in enumerate(schema)]
        return pa.Table.from_arrays(lists, schema=schema), invalid

    tables: list[pa.Table] = []
    problems: list[tuple[str, str]] = []
    for table, invalid in _map_in_threads(encode_part, range(0, len(rows), _ROWS_PER_TASK), recipe):
        tables.append(table)
        problems += invalid[: MAX_PROBLEMS - len(problems)]
        if len(problems) == MAX_PROBLEMS:
            break
    if problems:
        raise InputError(f"`{recipe.option}`: rows that can't be rendered:\n{list_problems(problems)}")
    return pa.concat_tables([schema.empty_table(), *tables]).combine_chunks()


def _map_in_threads(work: Callable[[int], Part], starts: Sequence[int], recipe: Recipe) -> Iterator[Part]:
    """Yield the result of `work` for each start, in order."""
    threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS, len(starts) - 1)
    if threads < 2 or not (recipe.is_fast and recipe.threads):
        yield from map(work, starts)
        return
    yield work(starts[0])  # before the others: the first call initializes the tokenizer
    pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")
    try:
        yield from pool.map(work, starts[1:])
    finally:
        pool.shutdown(cancel_futures=True)
