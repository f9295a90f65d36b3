"""The journal of a shard's scores: a line per call, each with a checksum over itself and all lines before it."""

import json
import math
from pathlib import Path
from typing import Any

from rlhf_pl.store.files import DamagedStoreError, checksum
from rlhf_pl.utils.disk import naming_a_full_disk, write_atomically
from rlhf_pl.utils.public_names import with_public_descriptions

Entry = list[Any]  # ["result", reward, components, truncated tokens] or ["failure", kind, detail]


class Journal:
    """What calls of a reward returned, until their shard is written.

    A line is `<checksum> <JSON>`; the first says what the scores were made of. A checksum covers the line and the
    checksum before it, so that lines which are changed, missing, repeated or in another order are noticed. A line
    without an end was torn when its process died, and is dropped. Journals of versions without checksums are taken
    where every line is what it should be.

    Args:
        path: The file; made by the first `add`.
        made_of: What the scores are made of: a journal of other answers or of another reward is deleted.
    """

    def __init__(self, path: Path, made_of: list[str]) -> None:
        self.path, self.made_of = path, made_of
        self._last = ""

    def read(self) -> list[Entry]:
        """What was kept.

        Raises:
            DamagedStoreError: A line is not what was written.
        """
        if not self.path.exists():
            return []
        content = _read(self.path)
        lines, whole = _lines(content)
        if _is_damaged(content, whole):
            raise DamagedStoreError(
                f"{self.path} is damaged after {max(0, len(lines) - 1)} calls. The same command with --repair keeps "
                "these and has the rest scored again."
            )
        if not lines or with_public_descriptions(lines[0]) != self.made_of:
            self.path.unlink()
            return []
        if whole < len(content) or content.startswith(b"["):
            _rewrite(self.path, lines)
        self._last = _text(lines)[1]
        return [entry for line in lines[1:] for entry in line]

    def add(self, entries: list[Entry]) -> None:
        """Keep the outcomes of a call."""
        lines = [self.made_of, entries] if self._last == "" else [entries]
        text, last = _text(lines, self._last)
        with naming_a_full_disk(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="ascii") as file:
                file.write(text)
        self._last = last


def is_whole_journal(path: Path) -> bool:
    """Whether a journal's lines are what was written; a last one that was torn is no damage."""
    if not path.is_file():
        return False
    content = _read(path)
    return not _is_damaged(content, _lines(content)[1])


def cut_journal(path: Path) -> None:
    """Keep the lines before the first that is damaged."""
    lines, _ = _lines(_read(path))
    if lines:
        _rewrite(path, lines)
    else:
        path.unlink()


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b"\n"  # a folder, say, is damage


def _is_damaged(content: bytes, whole: int) -> bool:
    return b"\n" in content[whole:]


def _lines(content: bytes) -> tuple[list[Any], int]:
    """The lines before the first that is damaged or torn, and how many bytes they have."""
    has_checksums = not content.startswith(b"[")
    lines: list[Any] = []
    last, size = "", 0
    for raw in content.split(b"\n")[:-1]:
        noted, text = raw.split(b" ", 1) if has_checksums and b" " in raw else (b"", raw)
        last = checksum(last.encode() + text)
        value = _parsed(text)
        if (has_checksums and noted != last.encode()) or not (_is_outcomes(value) if lines else _is_header(value)):
            break
        lines.append(value)
        size += len(raw) + 1
    return lines, size


def _parsed(text: bytes) -> Any:
    """JSON without NaN and infinities; None where it is not that."""
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


def _text(lines: list[Any], last: str = "") -> tuple[str, str]:
    """Lines as they stand in the file after one with the checksum `last`, and their own last checksum."""
    text = ""
    for line in lines:
        written = json.dumps(line)
        last = checksum((last + written).encode())
        text += f"{last} {written}\n"
    return text, last


def _rewrite(path: Path, lines: list[Any]) -> None:
    content = _text(lines)[0].encode()
    write_atomically(path, lambda file: file.write(content))
