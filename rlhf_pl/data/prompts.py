"""Prompt rows: read from files or the Hub, checked one by one, split, and cut to the length limit."""

import csv
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_pl.chat import Message, encode_prompt, message_problem, with_system_prompt
from rlhf_pl.errors import InputError

MAX_PROBLEMS = 10


@dataclass(frozen=True)
class Prompt:
    """One row of prompt data.

    Args:
        prompt_id: Unique name of the row.
        messages: The conversation that the policy answers, system prompt included.
        columns: The row's other columns; every row has the same ones.
        token_ids: The conversation by the policy's chat template; empty until `tokenize_prompts`.
    """

    prompt_id: str
    messages: list[Message]
    columns: Mapping[str, Any] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()


def load_prompts(
    source: str, columns: Mapping[str, str] | None = None, system_prompt: str | None = None, split: str = "train"
) -> list[Prompt]:
    """All prompts of a file or a Hub data set.

    A row has `prompt` (text, or a list of chat messages) or `messages` (a conversation; an answer at its end is left
    out), and may have `prompt_id`. Other columns go to the reward. Rows without `prompt_id` are named by their number.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, or a Hub id.
        columns: What the data calls our columns, such as `{"prompt": "question", "prompt_id": "id"}`.
        system_prompt: Put in front of conversations that have none.
        split: Split of a Hub data set.

    Raises:
        InputError: The source can't be read, or rows are wrong: up to 10 are listed.
    """
    columns = dict(columns or {})
    unknown = set(columns) - {"prompt", "messages", "prompt_id"}
    if unknown:
        raise InputError(
            f"`data.columns` maps {sorted(unknown)}, which are not ours: the keys are `prompt`, `messages` and "
            "`prompt_id`, the values are the names in your data."
        )
    prompts: list[Prompt] = []
    problems: list[tuple[str, str]] = []
    seen: dict[str, str] = {}
    names: dict[str, None] = {}  # an ordered set
    for number, (where, row) in enumerate(_read_rows(source, split)):
        if len(problems) == MAX_PROBLEMS:
            break
        try:
            if isinstance(row, InputError):
                raise row
            prompt = _parse_row(row, number, columns, system_prompt)
        except InputError as error:
            problems.append((where, str(error)))
            continue
        if prompt.prompt_id in seen:
            found = f"{prompt.prompt_id!r}, which is also that of {seen[prompt.prompt_id]}"
            problems.append((where, f"`{columns.get('prompt_id', 'prompt_id')}` is {found}; expected one of its own"))
            continue
        seen[prompt.prompt_id] = where
        names.update(dict.fromkeys(prompt.columns))
        prompts.append(prompt)
    if problems:
        raise InputError(f"`data.prompts`: wrong rows in {source!r}:\n{_list_problems(problems)}")
    if not prompts:
        raise InputError(f"`data.prompts`: {source!r} has no rows.")
    return [Prompt(p.prompt_id, p.messages, {name: p.columns.get(name) for name in names}) for p in prompts]


def count_duplicates(prompts: Sequence[Prompt]) -> int:
    """Prompts whose conversation an earlier one has too, under another id."""
    return len(prompts) - len({json.dumps(p.messages, sort_keys=True) for p in prompts})


def _list_problems(problems: Sequence[tuple[str, str]]) -> str:
    """A line each, or one for all of them where they are the same."""
    if len(problems) > 1 and len({text for _, text in problems}) == 1:
        (first, text), (last, _) = problems[0], problems[-1]
        more = " and perhaps on" if len(problems) == MAX_PROBLEMS else ""
        return f"  {first} to {last}{more}: {text}"
    lines = [f"  {where}: {text}" for where, text in problems]
    return "\n".join([*lines, "  (the first 10; there may be more)"] if len(lines) == MAX_PROBLEMS else lines)


def _parse_row(row: Any, number: int, columns: Mapping[str, str], system_prompt: str | None) -> Prompt:
    if not isinstance(row, Mapping):
        raise InputError(f"expected an object with a `prompt`, found {type(row).__name__}")
    if problem := _text_problem(row):
        raise InputError(problem)
    key = next((k for k in ("prompt", "messages") if columns.get(k, k) in row), None)
    if key is None:
        wanted = " or ".join(f"`{columns.get(k, k)}`" for k in ("prompt", "messages"))
        raise InputError(
            f"no column {wanted}; found {', '.join(map(str, row)) or 'none'}. Name yours with --data.columns.prompt"
        )
    column = columns.get(key, key)
    value = row[column]
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"`{column}` is empty; expected text or a list of messages")
        messages: Any = [{"role": "user", "content": value}]
    else:
        messages = list(value) if isinstance(value, Sequence) else value
        if key == "messages":
            while isinstance(messages, list) and messages and _is_assistant(messages[-1]):
                messages.pop()
    if problem := message_problem(messages):
        raise InputError(f"`{column}`: {problem}")
    id_column = columns.get("prompt_id", "prompt_id")
    prompt_id = row.get(id_column)
    if prompt_id is None:
        if "prompt_id" in columns and id_column not in row:
            raise InputError(f"no column `{id_column}`; found {', '.join(row)}")
        prompt_id = f"row-{number}"
    elif not isinstance(prompt_id, str | int) or isinstance(prompt_id, bool) or prompt_id == "":
        raise InputError(f"`{id_column}` is {prompt_id!r}; expected text or a whole number")
    messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    rest = {str(k): v for k, v in row.items() if k not in (column, id_column)}
    return Prompt(str(prompt_id), with_system_prompt(messages, system_prompt), rest)


def _text_problem(row: Mapping[str, Any]) -> str | None:
    """What keeps the row from being written as UTF-8, if anything does."""
    for name, value in row.items():
        try:
            json.dumps([name, value], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            return f"`{_printable(name)}` holds half of a surrogate pair (\\ud800 to \\udfff); expected Unicode text"
        except RecursionError:
            return f"`{_printable(name)}` is nested too deeply"
        except (TypeError, ValueError) as error:
            return f"`{_printable(name)}` cannot be kept as JSON: {error}"
    return None


def _printable(name: Any) -> str:
    return str(name).encode("ascii", "backslashreplace").decode()


def _is_assistant(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "assistant"


def _read_rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) for every row; an InputError in place of a row that can't be read."""
    path = Path(source)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:  # a name too long, say
        raise InputError(f"`data.prompts`: cannot look for {source!r}: {error.strerror}.") from error
    if is_file:
        readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise InputError(f"`data.prompts`: {source!r} ends in none of {', '.join(readers)}.")
        return _with_file_errors(path, reader)
    if is_folder:
        raise InputError(f"`data.prompts`: {source!r} is a folder; give a file ({source}/….jsonl).")
    if path.exists():
        raise InputError(f"`data.prompts`: {source!r} is no regular file.")
    if path.suffix or source.startswith(("/", ".", "~")) or source.count("/") != 1:
        raise InputError(f"`data.prompts`: no file {source!r} (looked in {Path.cwd()}).")
    return iter(_read_hub(source, split))


def _with_file_errors(path: Path, reader: Callable[[Path], Iterable[tuple[str, Any]]]) -> Iterator[tuple[str, Any]]:
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise InputError(f"`data.prompts`: {path} is not UTF-8 text: {error}.") from error
    except OSError as error:
        raise InputError(f"`data.prompts`: cannot read {path}: {error.strerror or error}.") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line.strip())
                except (ValueError, RecursionError) as error:
                    yield f"line {number}", InputError(f"found no JSON ({_reason(error)}); expected one object a line")


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _read_json(path: Path) -> Iterable[tuple[str, Any]]:
    """A list of rows; a .json file that holds JSON Lines is read as such."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and error.lineno > 1:
            return _read_jsonl(path)
        raise InputError(f"`data.prompts`: {path} is no JSON: {_reason(error)}.") from error
    if not isinstance(rows, list):
        raise InputError(f"`data.prompts`: {path} holds {type(rows).__name__}; expected a list of rows.")
    return ((f"row {i}", row) for i, row in enumerate(rows))


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # prompts may be longer than the default of 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            names = reader.fieldnames or ()
            if len(set(names)) < len(names):
                raise InputError(f"`data.prompts`: {path}, line 1: the header names a column twice: {list(names)}.")
            for row in reader:
                extra = row.pop(None, None)
                if extra is not None or None in row.values():
                    count = len(names) + len(extra or ()) - sum(v is None for v in row.values())
                    found = InputError(f"found {count} fields; expected {len(names)}, as in the header")
                    yield f"line {reader.line_num}", found
                else:
                    yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise InputError(f"`data.prompts`: {path}, near line {reader.line_num}: {error}.") from error


def _read_parquet(path: Path) -> Iterable[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.ParquetFile(path).read().to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError, NotImplementedError) as error:
        raise InputError(f"`data.prompts`: {path} is no readable Parquet file: {error}.") from error
    return ((f"row {i}", row) for i, row in enumerate(rows))


def _read_hub(name: str, split: str) -> Iterable[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    except Exception as error:  # the Hub client raises a dozen unrelated types
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise InputError(
            f"`data.prompts`: {name!r} is no file here, and the Hub did not give it (split {split!r}): "
            f"{type(error).__name__}: {first_line}"
        ) from error
    return ((f"row {i}", row) for i, row in enumerate(rows))


def tokenize_prompts(prompts: Sequence[Prompt], tokenizer: Any, max_prompt_tokens: int) -> tuple[list[Prompt], int]:
    """The prompts with token ids that fit, and how many were too long."""
    kept = []
    for prompt in prompts:
        try:
            ids = encode_prompt(tokenizer, prompt.messages)
        except Exception as error:  # a template may refuse roles or their order, each in its own way
            raise InputError(
                f"`data.prompts`: the chat template refuses prompt_id {prompt.prompt_id!r} "
                f"(roles {[m['role'] for m in prompt.messages]}): {error}"
            ) from error
        if len(ids) <= max_prompt_tokens:
            kept.append(Prompt(prompt.prompt_id, prompt.messages, prompt.columns, tuple(ids)))
    return kept, len(prompts) - len(kept)


def split_held_out(prompts: Sequence[Prompt], count: int) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts. The held-out ones follow from the ids alone, whatever the seed or row order."""
    ranked = sorted(prompts, key=lambda p: hashlib.sha256(p.prompt_id.encode()).digest())
    held_out = {p.prompt_id for p in ranked[:count]}
    return [p for p in prompts if p.prompt_id not in held_out], [p for p in prompts if p.prompt_id in held_out]


def prompts_of_round(prompts: Sequence[Prompt], round_index: int, per_round: int | None, seed: int) -> list[Prompt]:
    """The prompts of one round: a pure function of its arguments.

    The prompts are shuffled and cut into slices, a slice a round; when no whole slice is left they are shuffled anew.
    So no prompt comes twice in a round, and none again before (almost) all others.
    """
    size = len(prompts) if per_round is None else min(per_round, len(prompts))
    turn, slot = divmod(round_index, len(prompts) // size)
    order = list(range(len(prompts)))
    random.Random(f"{seed}:{turn}").shuffle(order)
    return [prompts[i] for i in order[slot * size : (slot + 1) * size]]
