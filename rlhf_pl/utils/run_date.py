"""The date for chat templates: the day the run began, also if it continues after midnight."""

import re
from datetime import datetime
from pathlib import Path

import lightning as L

from rlhf_pl.utils.disk import write_atomically
from rlhf_pl.utils.errors import InputError

_FILE = "date.txt"
_date: datetime | None = None
_used = False


def strftime_now(form: str) -> str:
    """The templates' function of this name: formats the run's date, or the current date outside of runs."""
    global _used
    _used = True
    return (_date or datetime.now()).strftime(form)


def get_dates(template: str) -> list[str]:
    """The formatted dates that a chat template uses, for cache keys. The date then counts as used.

    If the template's formats are not literals, the result is the date with the time.
    """
    calls = template.replace("strftime_now is defined", "").count("strftime_now")
    formats = [form for _, form in re.findall(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", template)]
    return [strftime_now(form) for form in (formats if len(formats) == calls else ["%c %f"])] if calls else []


def set_run_date(trainer: L.Trainer | None = None) -> None:
    """Set the date to that of the run that is resumed, or to now. It is the same in all processes of a run.

    Raises:
        InputError: The date in the run directory can't be read.
    """
    global _date, _used
    _used = False
    if trainer is None:
        _date = datetime.now()
        return
    file = Path(trainer.default_root_dir) / _FILE
    text = file.read_text().strip() if file.is_file() else datetime.now().isoformat()
    if trainer.world_size > 1:
        text = trainer.strategy.broadcast(text)
    try:
        _date = datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(
            f"{file} must hold the time when the run began, such as 2026-01-31T12:00:00: {error}."
        ) from error


def save_run_date(trainer: L.Trainer) -> None:
    """Write the date to the run directory, if a template has used it."""
    file = Path(trainer.default_root_dir) / _FILE
    if trainer.is_global_zero and _used and _date is not None and not file.exists():
        text = _date.isoformat() + "\n"
        write_atomically(file, lambda out: out.write(text.encode()))
