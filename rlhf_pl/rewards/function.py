"""Plain Python functions as rewards, by import path."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_pl.rewards.base import Reward, Sample
from rlhf_pl.rewards.isolated import IsolatedFunction
from rlhf_pl.rewards.results import Outcome, outcomes_of
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.fingerprints import code_fingerprint

_ONE = ("prompt", "response", "messages", "finished", "response_tokens", "prompt_id", "response_message", "tools")
_GENERATORS = (inspect.isgeneratorfunction, inspect.isasyncgenfunction)
_MANY = {"prompts": "prompt", "responses": "response", "samples": None}


class FunctionReward(Reward):
    """A Python function as a reward.

    The function is called with the arguments it names. For one answer at a time: `prompt` (text of the last message),
    `response` (text), `response_message` (with its tool calls), `messages`, `tools`, `finished`, `response_tokens`,
    `prompt_id`, any column of the data, or `**columns` for all of them; it returns a number. A function that names
    `responses` (or `samples`) is called once for a batch: `prompts` and `responses` are lists, every other argument is
    a list with one entry per answer, `samples` is the list of `Sample` objects; it returns one number per answer.

    Args:
        function: `package.module.function`, or `path/to/file.py:function`, or the function itself.
    """

    def __init__(self, function: str | Callable[..., Any]) -> None:
        self._function = import_function(function) if isinstance(function, str) else function
        self._path = function if isinstance(function, str) else None
        self._isolated: IsolatedFunction | None = None
        self._name = function if isinstance(function, str) else getattr(function, "__qualname__", repr(function))
        if any(check(self._function) for check in (inspect.iscoroutinefunction, *_GENERATORS)):
            raise InputError(
                f"Reward `{self._name}` is an `async` function or a generator. It must return its scores: call what is "
                "asynchronous with asyncio.run(), and return a list rather than yield."
            )
        parameters = inspect.signature(self._function).parameters.values()
        self._wants_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._required = {p.name for p in named if p.default is p.empty}
        self._names = {p.name for p in named}
        self._batched = bool(self._names & {"responses", "samples"})
        if not self._wants_all and not self._names & {"response", "responses", "samples", "response_tokens"}:
            raise InputError(
                f"Reward `{self._name}` takes {sorted(self._names) or 'no arguments'}; it must take `response` (one "
                "answer) or `responses` (a batch), and may take `prompt`, `messages`, `finished` or any data column."
            )

    @property
    def name(self) -> str:
        return self._name

    def fingerprint(self) -> str:
        return f"{self._name}:{code_fingerprint(self._function)}"

    def check(self, samples: Sequence[Sample]) -> None:
        available = {*_ONE, *_MANY, *(name for s in samples for name in s.columns)}
        unknown = self._required - available
        if unknown:
            raise InputError(
                f"Reward `{self._name}` asks for {sorted(unknown)}, which is neither a column of the data nor one of "
                f"{sorted({*_ONE, *_MANY})}. Columns: {sorted(available - set(_ONE) - set(_MANY)) or 'none'}."
            )

    @property
    def trial(self) -> bool:
        return True

    @property
    def one_by_one(self) -> bool:
        return not self._batched

    def isolate(self) -> None:
        """Run the function in a process of its own from now on.

        Raises:
            InputError: It was not named by its import path, so that another process can't find it.
        """
        if self._path is None:
            raise InputError(
                f"`rollout.scoring.isolate`: reward `{self._name}` is a function object. Name it by its import path "
                "(package.module.function or path/to/file.py:function), so that another process can import it."
            )
        self._isolated = self._isolated or IsolatedFunction(self._path)

    def open(self) -> None:
        if self._isolated is not None:
            self._isolated.open()

    def close(self) -> None:
        if self._isolated is not None:
            self._isolated.close()

    def score(self, batch: Sequence[Sample]) -> list[Outcome]:
        if not batch:
            return []
        if self._isolated is not None:
            return self._isolated.score(batch)
        _look_beside(getattr(self._function, "__module__", None) or "")
        if not self._batched:
            return outcomes_of([self._function(**self._arguments(s)) for s in batch], batch)
        rows = [self._arguments(s, many=True) for s in batch]
        arguments: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        return outcomes_of(self._function(**arguments), batch)

    def _arguments(self, sample: Sample, many: bool = False) -> dict[str, Any]:
        values: dict[str, Any] = {**sample.columns, **{name: getattr(sample, name) for name in _ONE}}
        if sample.tools is None and "tools" in sample.columns:
            values["tools"] = sample.columns["tools"]
        if many:
            values |= {plural: getattr(sample, one) if one else sample for plural, one in _MANY.items()}
        return values if self._wants_all else {name: values[name] for name in self._names if name in values}


def import_function(path: str) -> Callable[..., Any]:
    """The function at `package.module.function` or `path/to/file.py:function`.

    Modules are also looked for in the current directory, and by a file beside it, as in `python file.py`.

    Raises:
        InputError: Says which part of the path was not found.
    """
    file, colon, name = path.partition(":")
    if colon:
        module = _import_file(path, file)
    else:
        dotted, _, name = path.rpartition(".")
        if not dotted:
            raise InputError(
                f"`rollout.reward`: {path!r} is no import path. Give package.module.function or path/to/file.py:name."
            )
        module = _import_module(path, dotted)
    if not hasattr(module, name):
        found = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise InputError(
            f"`rollout.reward`: {path!r} not found: module {module.__name__!r} has no {name!r}. Its functions: "
            f"{', '.join(found) or 'none'}."
        )
    function = getattr(module, name)
    if not callable(function):
        raise InputError(f"`rollout.reward`: {path!r} is {type(function).__name__}, not a function.")
    return function


def _import_module(path: str, dotted: str) -> Any:
    try:
        with _current_directory():
            return importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        if error.name and (dotted == error.name or dotted.startswith(error.name + ".")):
            raise InputError(
                f"`rollout.reward`: {path!r} not found: there is no module {error.name!r} in {Path.cwd()} or among "
                "the installed packages."
            ) from error
        raise InputError(f"`rollout.reward`: importing {dotted!r} failed: {error}.") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"`rollout.reward`: importing {dotted!r} failed: {type(error).__name__}: {error}.") from error


def _import_file(path: str, file: str) -> Any:
    location = Path(file)
    if not location.is_file():
        raise InputError(f"`rollout.reward`: {path!r} not found: there is no file {file!r}.")
    if location.suffix != ".py":
        raise InputError(f"`rollout.reward`: {file!r} is no Python file.")
    from rlhf_pl.utils.by_path import import_path  # which has Python look for modules of its own

    try:
        return import_path(file)
    except (Exception, SystemExit) as error:
        raise InputError(f"`rollout.reward`: running {file!r} failed: {type(error).__name__}: {error}.") from error


def _look_beside(module: str) -> None:
    """Let a function of a file that was named by its path import what lies beside it."""
    if by_path := sys.modules.get("rlhf_pl.utils.by_path"):
        by_path.look_beside(module)


@contextmanager
def _current_directory() -> Iterator[None]:
    """In which modules are also looked for in the current directory, as the command line does all the time."""
    folder = str(Path.cwd())
    if "" in sys.path or folder in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
