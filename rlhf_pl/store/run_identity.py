"""Identifies the run that rounds belong to, to detect rounds that were copied from other run directories."""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_pl.store.files import list_entries, read_checked, write_checked

STORE = "store.json"  # file of a run directory with the id of its run
ROUNDS, HELD_OUT = "rounds", "heldout"  # folders of a run directory


def recorded_run(run_dir: Path) -> str | None:
    """Id of the run that the file of a run directory records; None if there is none."""
    run = (read_checked(run_dir / STORE) or {}).get("run")
    return run if isinstance(run, str) else None


def find_run(run_dir: Path) -> str | None:
    """Id of the run of a run directory: the recorded one, or, if no manifest has it, the one of most manifests.

    None for the directories of older versions.
    """
    recorded = recorded_run(run_dir)
    paths = [path for kind in (ROUNDS, HELD_OUT) for path in find_round_folders(run_dir / kind).values()]
    contents = [(path, read_checked(path / "manifest.json")) for path in paths]
    runs = [c["run"] for path, c in contents if c is not None and "run" in c and is_own(path, c, None)]
    return recorded if recorded in runs or not runs else max(runs, key=runs.count)


def identify(run_dir: Path) -> str:
    """Id of the run of a run directory; created and recorded if there is none."""
    run = find_run(run_dir) or secrets.token_hex(8)
    if recorded_run(run_dir) is None:
        write_checked(run_dir / STORE, {"run": run})
    return run


def is_own(path: Path, content: dict[str, Any], run: str | None) -> bool:
    """Whether a manifest or note is of the round at `path` and of `run`; always true for those of older versions."""
    return "run" not in content or (content.get("round") == round_name(path) and run in (None, content["run"]))


def round_name(path: Path) -> str:
    """Name of the round in a folder, e.g. `rounds/0002`."""
    return f"{path.parent.name}/{path.name}"


def find_round_folders(folder: Path) -> dict[int, Path]:
    """The folders of rounds in a folder by number, ascending."""
    return dict(_iterate_round_folders(folder))


def _iterate_round_folders(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in list_entries(folder):
        if path.name.isdecimal() and path.name == f"{int(path.name):04d}" and path.is_dir():
            yield int(path.name), path
