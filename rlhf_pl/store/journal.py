"""The journal of a shard's scores: a line per reward call, with a checksum over it and all lines before it."""

import json
import math
from pathlib import Path
from typing import Any

from rlhf_pl.store.files import DamagedStoreError, checksum
from rlhf_pl.utils.disk import translate_full_disk, write_atomically
from rlhf_pl.utils.public_names import with_public_descriptions

Entry = list[Any]  # ["result", reward, components, truncated tokens] or ["failure", kind, detail]


class Journal:
    """The results of reward calls, until their shard is written.

    A line is `<checksum> <JSON>`. The first line holds the inputs of the scores. A checksum covers the line and the
    checksum before it, so that changed, missing, repeated and reordered lines are detected. An incomplete last line was
    interrupted when its process died, and is dropped. Journals of versions without checksums are accepted if every line
    is valid.

    Args:
        path: The file; created by the first `add`.
        inputs: What the scores depend on: a journal of other responses or of another reward is deleted.
    """

    def __init__(self, path: Path, inputs: list[str]) -> None:
        self.path, self.inputs = path, inputs
        self._last_checksum = ""

    def read(self) -> list[Entry]:
        """The stored results.

        Raises:
            DamagedStoreError: A line was changed.
        """
        if not self.path.exists():
            return []
        content = _read(self.path)
        lines, size = _parse_lines(content)
        if _is_damaged(content, size):
            raise DamagedStoreError(
                f"{self.path} is damaged after {max(0, len(lines) - 1)} calls. Run the same command with --repair to "
                "keep these and score the other responses again."
            )
        if not lines or with_public_descriptions(lines[0]) != self.inputs:
            self.path.unlink()
            return []
        if size < len(content) or content.startswith(b"["):
            _rewrite(self.path, lines)
        self._last_checksum = _format_lines(lines)[1]
        return [entry for line in lines[1:] for entry in line]

    def add(self, entries: list[Entry]) -> None:
        """Append the results of a call."""
        lines = [self.inputs, entries] if self._last_checksum == "" else [entries]
        text, last = _format_lines(lines, self._last_checksum)
        with translate_full_disk(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="ascii") as file:
                file.write(text)
        self._last_checksum = last


def is_whole_journal(path: Path) -> bool:
    """Whether all complete lines of a journal are valid; an incomplete last line is not damage."""
    if not path.is_file():
        return False
    content = _read(path)
    return not _is_damaged(content, _parse_lines(content)[1])


def truncate_journal(path: Path) -> None:
    """Truncate a journal before its first damaged line."""
    lines, _ = _parse_lines(_read(path))
    if lines:
        _rewrite(path, lines)
    else:
        path.unlink()


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b"\n"  # a damaged line: a folder, for example, is damage


def _is_damaged(content: bytes, valid_size: int) -> bool:
    return b"\n" in content[valid_size:]


def _parse_lines(content: bytes) -> tuple[list[Any], int]:
    """(lines before the first damaged or incomplete one, their size in bytes)."""
    has_checksums = not content.startswith(b"[")
    lines: list[Any] = []
    last, size = "", 0
    for raw in content.split(b"\n")[:-1]:
        expected, text = raw.split(b" ", 1) if has_checksums and b" " in raw else (b"", raw)
        last = checksum(last.encode() + text)
        value = _parse_json(text)
        if (has_checksums and expected != last.encode()) or not (_is_outcomes(value) if lines else _is_header(value)):
            break
        lines.append(value)
        size += len(raw) + 1
    return lines, size


def _parse_json(text: bytes) -> Any:
    """Parse JSON without NaN and infinities; None for anything else."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> Any:
    raise ValueError(name)


def _is_header(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _is_outcomes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, list) and _is_outcome(*entry) for entry in value)


def _is_outcome(kind: Any = None, *values: Any) -> bool:
    if kind == "failure":
        return len(values) == 2 and all(isinstance(value, str) for value in values)
    if kind != "result" or len(values) != 3:
        return False
    reward, components, truncated = values
    return _is_number(reward) and isinstance(components, dict) and isinstance(truncated, int)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def _format_lines(lines: list[Any], last: str = "") -> tuple[str, str]:
    """(text of lines that follow one with the checksum `last`, checksum of the last line)."""
    text = ""
    for line in lines:
        encoded = json.dumps(line)
        last = checksum((last + encoded).encode())
        text += f"{last} {encoded}\n"
    return text, last


def _rewrite(path: Path, lines: list[Any]) -> None:
    content = _format_lines(lines)[0].encode()
    write_atomically(path, lambda file: file.write(content))
