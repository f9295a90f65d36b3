"""What can happen to a file or a folder, and how what came of it is told."""

import argparse
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

Harm = Callable[[Path, random.Random], None]


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(content))


def cut(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(max(1, len(content)))])


def lengthen(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(1 + rng.randrange(64)))


def empty(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def garbage(file: Path, rng: random.Random) -> None:
    file.write_bytes(rng.randbytes(file.stat().st_size or 16))


def zeros(file: Path, rng: random.Random) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def other_json(file: Path, rng: random.Random) -> None:
    """What is JSON, but not what is expected."""
    file.write_text(json.dumps(rng.choice([None, [], {}, 1, "x", [[[]]], {"schema_version": "x"}])))


def delete(file: Path, rng: random.Random) -> None:
    file.unlink()


def make_folder(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


def dangling_link(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def neighbour(file: Path, rng: random.Random) -> None:
    """The content of another file of its kind, or of its folder."""
    others = sorted(f for f in file.parent.iterdir() if f.is_file() and not f.is_symlink() and f != file)
    same = [f for f in others if f.suffix == file.suffix] or others
    if same:
        shutil.copy(rng.choice(same), file)


def remove_folder(folder: Path, rng: random.Random) -> None:
    shutil.rmtree(folder)


def empty_folder(folder: Path, rng: random.Random) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def file_instead(folder: Path, rng: random.Random) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"x")


def dangling_folder(folder: Path, rng: random.Random) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


OF_FILES: tuple[Harm, ...] = (
    *(flip, cut, lengthen, empty, garbage, zeros, other_json, delete, make_folder, dangling_link, neighbour),
)
OF_FOLDERS: tuple[Harm, ...] = (remove_folder, empty_folder, file_instead, dangling_folder)


def report(header: str, table: Counter[tuple[str, str]], failures: int, started: float) -> int:
    """Print a Markdown table of (kind, outcome) with their counts; returns the exit code."""
    print(f"\n{table.total()} trials in {time.monotonic() - started:.0f} s, {failures} failures\n")
    print(f"| {header} | outcome | trials |\n| --- | --- | --- |")
    for (kind, outcome), count in sorted(table.items()):
        print(f"| {kind} | {outcome} | {count} |")
    return 1 if failures else 0


def arguments_of(description: str) -> argparse.Namespace:
    """`--trials`, `--seed` and `--show`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--trials", type=int, help="so many of all, by chance")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--show", action="store_true", help="print every message")
    return parser.parse_args()
