"""Faults of files and folders, and the report of the trials with them."""

import argparse
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

Fault = Callable[[Path, random.Random], None]


def flip_bit(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(content))


def truncate(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(max(1, len(content)))])


def lengthen(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(1 + rng.randrange(64)))


def make_empty(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def fill_with_garbage(file: Path, rng: random.Random) -> None:
    file.write_bytes(rng.randbytes(file.stat().st_size or 16))


def fill_with_zeros(file: Path, rng: random.Random) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def write_other_json(file: Path, rng: random.Random) -> None:
    """Replace the content by valid JSON of another form."""
    file.write_text(json.dumps(rng.choice([None, [], {}, 1, "x", [[[]]], {"schema_version": "x"}])))


def delete(file: Path, rng: random.Random) -> None:
    file.unlink()


def replace_by_folder(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


def replace_by_dangling_link(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def copy_neighbour(file: Path, rng: random.Random) -> None:
    """Replace the content by that of another file of the folder, of the same type if there is one."""
    others = sorted(f for f in file.parent.iterdir() if f.is_file() and not f.is_symlink() and f != file)
    same = [f for f in others if f.suffix == file.suffix] or others
    if same:
        shutil.copy(rng.choice(same), file)


def remove_folder(folder: Path, rng: random.Random) -> None:
    shutil.rmtree(folder)


def empty_folder(folder: Path, rng: random.Random) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def replace_by_file(folder: Path, rng: random.Random) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"x")


def replace_folder_by_dangling_link(folder: Path, rng: random.Random) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


FILE_FAULTS: tuple[Fault, ...] = (
    *(flip_bit, truncate, lengthen, make_empty, fill_with_garbage, fill_with_zeros, write_other_json, delete),
    *(replace_by_folder, replace_by_dangling_link, copy_neighbour),
)
FOLDER_FAULTS: tuple[Fault, ...] = (remove_folder, empty_folder, replace_by_file, replace_folder_by_dangling_link)


def print_report(header: str, table: Counter[tuple[str, str]], failures: int, started: float) -> int:
    """Print a Markdown table of the counts by kind and outcome; returns the exit code."""
    print(f"\n{table.total()} trials in {time.monotonic() - started:.0f} s, {failures} failures\n")
    print(f"| {header} | outcome | trials |\n| --- | --- | --- |")
    for (kind, outcome), count in sorted(table.items()):
        print(f"| {kind} | {outcome} | {count} |")
    return 1 if failures else 0


def parse_arguments(description: str) -> argparse.Namespace:
    """Parse `--trials`, `--seed` and `--show`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--trials", type=int, help="number of random trials; all by default")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--show", action="store_true", help="print every message")
    return parser.parse_args()
