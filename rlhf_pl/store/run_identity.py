"""Which run the rounds of a run directory are of: rounds that were merged or restored from elsewhere are noticed."""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_pl.store.files import entries, read_checked, write_checked

STORE = "store.json"  # of a run directory: which run its rounds are of
ROUNDS, HELD_OUT = "rounds", "heldout"  # its folders


def noted_run(run_dir: Path) -> str | None:
    """Which run a run directory is of, as its file says; None if that says nothing."""
    run = (read_checked(run_dir / STORE) or {}).get("run")
    return run if isinstance(run, str) else None


def run_of(run_dir: Path) -> str | None:
    """Which run a run directory is of; where no manifest is of the noted one, as most say. None for older versions."""
    noted = noted_run(run_dir)
    paths = [path for kind in (ROUNDS, HELD_OUT) for path in numbered(run_dir / kind).values()]
    contents = [(path, read_checked(path / "manifest.json")) for path in paths]
    runs = [c["run"] for path, c in contents if c is not None and "run" in c and is_own(path, c, None)]
    return noted if noted in runs or not runs else max(runs, key=runs.count)


def identify(run_dir: Path) -> str:
    """Which run a run directory is of, noted for good."""
    run = run_of(run_dir) or secrets.token_hex(8)
    if noted_run(run_dir) is None:
        write_checked(run_dir / STORE, {"run": run})
    return run


def is_own(path: Path, content: dict[str, Any], run: str | None) -> bool:
    """Whether a manifest or note is of the round at `path`, of this run; those of older versions do not say."""
    return "run" not in content or (content.get("round") == name_of(path) and run in (None, content["run"]))


def name_of(path: Path) -> str:
    """`rounds/0002`, of a round's folder."""
    return f"{path.parent.name}/{path.name}"


def numbered(folder: Path) -> dict[int, Path]:
    """The folders of rounds in a folder, by number, ascending."""
    return dict(_numbered(folder))


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in entries(folder):
        if path.name.isdecimal() and path.name == f"{int(path.name):04d}" and path.is_dir():
            yield int(path.name), path
