"""The date that chat templates are told: that on which the run began, also when it goes on after midnight."""

import os
from datetime import datetime
from pathlib import Path

import lightning as L

from rlhf_pl.disk import write_atomically
from rlhf_pl.errors import InputError

_VARIABLE = "RLHF_PL_RUN_DATE"  # tells the processes that a run starts
_FILE = "date.txt"
_date: datetime | None = None
_used = False


def strftime_now(form: str) -> str:
    """What templates get under this name: the run's date, or outside of runs the present one."""
    global _used
    _used = True
    return (_date or datetime.now()).strftime(form)


def take_run_date(run_dir: str | None = None) -> None:
    """Fix the date: that of a run that goes on in `run_dir`, or now."""
    global _date, _used
    if run_dir is None:
        _date = datetime.now()
        return
    folder = Path(run_dir).absolute()
    file = folder / _FILE
    iso, _, of = os.environ.get(_VARIABLE, "").partition(" ")
    if file.is_file():
        iso = _read(file)
    elif of != str(folder):
        iso = datetime.now().isoformat()
    _date, _used = datetime.fromisoformat(iso), False
    os.environ[_VARIABLE] = f"{iso} {folder}"


def _read(file: Path) -> str:
    try:
        return datetime.fromisoformat(file.read_text().strip()).isoformat()
    except ValueError as error:
        raise InputError(
            f"{file} should hold the date on which the run began, such as 2026-01-31T12:00:00: {error}."
        ) from error


def keep_run_date(trainer: L.Trainer) -> None:
    """Note the date in the run directory, if a template has asked for it."""
    file = Path(trainer.default_root_dir) / _FILE
    if trainer.is_global_zero and _used and _date is not None and not file.exists():
        text = _date.isoformat() + "\n"
        write_atomically(file, lambda out: out.write(text.encode()))
