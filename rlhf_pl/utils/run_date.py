"""The date that chat templates are told: that on which the run began, also when it goes on after midnight."""

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
    """What templates get under this name: the run's date, or outside of runs the present one."""
    global _used
    _used = True
    return (_date or datetime.now()).strftime(form)


def dates_in(template: str) -> list[str]:
    """What a chat template may be told of the date, for keys of what is kept: it counts as asked for.

    Where a template does not name its formats plainly, that is the date with its time.
    """
    calls = template.replace("strftime_now is defined", "").count("strftime_now")
    formats = [form for _, form in re.findall(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", template)]
    return [strftime_now(form) for form in (formats if len(formats) == calls else ["%c %f"])] if calls else []


def take_run_date(trainer: L.Trainer | None = None) -> None:
    """Fix the date: that of a run that goes on, or now; the same in all processes of a run.

    Raises:
        InputError: The run directory's note of it can't be read.
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
        raise InputError(f"{file} should hold when the run began, as in 2026-01-31T12:00:00: {error}.") from error


def keep_run_date(trainer: L.Trainer) -> None:
    """Note the date in the run directory, if a template has asked for it."""
    file = Path(trainer.default_root_dir) / _FILE
    if trainer.is_global_zero and _used and _date is not None and not file.exists():
        text = _date.isoformat() + "\n"
        write_atomically(file, lambda out: out.write(text.encode()))
