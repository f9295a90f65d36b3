"""Reads rows of JSON Lines, JSON, CSV and Parquet files and of the Hub; errors name file, row and reason."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf_pl.utils.errors import InputError, describe_error
from rlhf_pl.utils.unique_keys import DuplicateKeyError, loads

MAX_PROBLEMS = 10
_PARQUET_ROWS = 1024  # number of rows that are converted to Python objects at a time


Row = Mapping[str, Any]
T = TypeVar("T")


class ArrowRow(dict[str, Any]):
    """A row of a table. Its objects have all keys of the column; None stands for a missing key."""


def parse_rows(source: str, split: str, option: str, parse: Callable[[str, int, Row], T]) -> list[T]:
    """Parse every row of a file or a Hub data set.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, or a Hub id.
        split: Split of a Hub data set.
        option: The option that names the source, for errors.
        parse: Called with (position of the row in words, its index, the row); raises InputError for an invalid row.

    Raises:
        InputError: The source can't be read or has no rows, or rows are invalid: up to 10 are listed.
    """
    parsed: list[T] = []
    problems: list[tuple[str, str]] = []
    for number, (where, row) in enumerate(read_rows(source, split, option)):
        if len(problems) == MAX_PROBLEMS:
            break
        try:
            if isinstance(row, InputError):
                raise row
            if not isinstance(row, Mapping):
                raise InputError(f"expected an object, found {type(row).__name__}")
            if problem := find_text_problem(row):
                raise InputError(problem)
            parsed.append(parse(where, number, row))
        except InputError as error:
            problems.append((where, str(error)))
        except RecursionError:
            problems.append((where, "the row is nested too deeply"))
    if problems:
        raise InputError(f"`{option}`: invalid rows in {source!r}:\n{list_problems(problems)}")
    if not parsed:
        raise InputError(f"`{option}`: {source!r} has no rows.")
    return parsed


def check_columns(columns: Mapping[str, str] | None, known: Sequence[str]) -> dict[str, str]:
    """The mapping from our column names to those of the data.

    Raises:
        InputError: It has keys that are not in `known`.
    """
    mapping = dict(columns or {})
    unknown = set(mapping) - set(known)
    if unknown:
        raise InputError(
            f"`data.columns` has unknown keys {sorted(unknown)}: the keys are "
            f"{', '.join(f'`{name}`' for name in known)}, the values are the names in your data."
        )
    return mapping


def read_rows(source: str, split: str, option: str) -> Iterator[tuple[str, Any]]:
    """Yield (position in words, row) for every row, with an InputError in place of a row that can't be read."""
    try:
        yield from _read_rows(source, split)
    except InputError as error:
        raise InputError(f"`{option}`: {error}") from error


def _read_rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    path = Path(source)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:  # for example, the name is too long
        raise InputError(f"cannot look for {source!r}: {error.strerror}.") from error
    if is_file:
        readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise InputError(f"{source!r} has none of the suffixes {', '.join(readers)}.")
        return _with_file_errors(path, reader)
    if is_folder:
        raise InputError(f"{source!r} is a folder; name a file ({source}/….jsonl).")
    if path.exists():
        raise InputError(f"{source!r} is not a regular file.")
    if path.suffix or source.startswith(("/", ".", "~")) or source.count("/") != 1:
        raise InputError(f"there is no file {source!r} (working directory: {Path.cwd()}).")
    return iter(_read_hub(source, split))


def _with_file_errors(path: Path, reader: Callable[[Path], Iterable[tuple[str, Any]]]) -> Iterator[tuple[str, Any]]:
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}.") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"line {number}", loads(line.strip())
                except DuplicateKeyError as error:
                    yield f"line {number}", InputError(str(error))
                except (ValueError, RecursionError) as error:
                    reason = _describe_error(error)
                    yield f"line {number}", InputError(f"not JSON ({reason}); expected one object per line")


def _describe_error(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _read_json(path: Path) -> Iterable[tuple[str, Any]]:
    """Read a list of rows; a .json file that holds JSON Lines is read as JSON Lines."""
    try:
        rows = loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except DuplicateKeyError as error:
        raise InputError(f"{path}: {error}.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and error.lineno > 1:
            return _read_jsonl(path)
        raise InputError(f"{path} is not JSON: {_describe_error(error)}.") from error
    if not isinstance(rows, list):
        raise InputError(f"{path} holds {type(rows).__name__}; expected a list of rows.")
    return ((f"row {i}", row) for i, row in enumerate(rows))


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # prompts may be longer than the default of 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            names = reader.fieldnames or ()
            if len(set(names)) < len(names):
                raise InputError(f"{path}, line 1: the header names a column twice: {list(names)}.")
            for row in reader:
                extra = row.pop(None, None)
                if extra is not None or None in row.values():
                    count = len(names) + len(extra or ()) - sum(v is None for v in row.values())
                    problem = InputError(f"found {count} fields; expected {len(names)}, as in the header")
                    yield f"line {reader.line_num}", problem
                else:
                    yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise InputError(f"{path}, near line {reader.line_num}: {error}.") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for row in batch.to_pylist():
                    yield f"row {number}", ArrowRow(row)
                    number += 1
    except (pa.ArrowException, OSError, ValueError, OverflowError, NotImplementedError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}.") from error


def _read_hub(name: str, split: str) -> Iterable[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    except Exception as error:  # the Hub client raises a dozen unrelated types
        raise InputError(
            f"{name!r} is not a file, and it could not be loaded from the Hub (split {split!r}): "
            f"{describe_error(error)}"
        ) from error
    return ((f"row {i}", ArrowRow(row)) for i, row in enumerate(rows))


def list_problems(problems: Sequence[tuple[str, str]]) -> str:
    """List problems, one per line; a single line if all are the same."""
    if len(problems) > 1 and len({text for _, text in problems}) == 1:
        (first, text), (last, _) = problems[0], problems[-1]
        more = " and perhaps further" if len(problems) == MAX_PROBLEMS else ""
        return f"  {first} to {last}{more}: {text}"
    lines = [f"  {where}: {text}" for where, text in problems]
    return "\n".join([*lines, "  (the first 10; there may be more)"] if len(lines) == MAX_PROBLEMS else lines)


def find_text_problem(row: Mapping[str, Any]) -> str | None:
    """The reason why a row can't be written as UTF-8 JSON; None if it can."""
    for name, value in row.items():
        try:
            json.dumps([name, value], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            return f"`{_printable(name)}` holds half of a surrogate pair (\\ud800 to \\udfff); expected Unicode text"
        except RecursionError:
            return f"`{_printable(name)}` is nested too deeply"
        except (TypeError, ValueError) as error:
            return f"`{_printable(name)}` cannot be stored as JSON: {error}"
    return None


def _printable(name: Any) -> str:
    return str(name).encode("ascii", "backslashreplace").decode()
