"""Python functions as rewards, given by their import path."""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_pl.rewards.base import Reward, Sample
from rlhf_pl.rewards.isolated import IsolatedFunction
from rlhf_pl.rewards.results import Outcome, parse_outcomes
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.fingerprints import code_fingerprint

_ARGUMENTS = ("prompt", "response", "messages", "finished", "response_tokens", "prompt_id", "response_message", "tools")
_GENERATORS = (inspect.isgeneratorfunction, inspect.isasyncgenfunction)
_BATCH_ARGUMENTS = {"prompts": "prompt", "responses": "response", "samples": None}


class FunctionReward(Reward):
    """A Python function as a reward.

    The function receives the arguments that its parameters name. Called for one response, these are `prompt` (text of
    the last message), `response` (text), `response_message` (with its tool calls), `messages`, `tools`, `finished`,
    `response_tokens`, `prompt_id`, any column of the data, or `**columns` for all of them; it returns a number. A
    function with a parameter `responses` (or `samples`) is called once per batch: `prompts` and `responses` are lists,
    `samples` is the list of `Sample` objects, and any other argument is a list with one entry per response; it returns
    one number per response.

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
                f"Reward `{self._name}` is an `async` function or a generator. It must return its scores: run "
                "asynchronous code with asyncio.run(), and return a list instead of yielding."
            )
        parameters = inspect.signature(self._function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._required = {p.name for p in named if p.default is p.empty}
        self._parameters = {p.name for p in named}
        self._is_batched = bool(self._parameters & {"responses", "samples"})
        if not self._takes_all and not self._parameters & {"response", "responses", "samples", "response_tokens"}:
            raise InputError(
                f"Reward `{self._name}` takes {sorted(self._parameters) or 'no arguments'}; it must take `response` "
                "(one response) or `responses` (a batch), and may take `prompt`, `messages`, `finished` or any data "
                "column."
            )

    @property
    def name(self) -> str:
        return self._name

    def fingerprint(self) -> str:
        return f"{self._name}:{code_fingerprint(self._function)}"

    def check(self, samples: Sequence[Sample]) -> None:
        arguments = {*_ARGUMENTS, *_BATCH_ARGUMENTS}
        columns = {name for s in samples for name in s.columns}
        unknown = self._required - arguments - columns
        if unknown:
            raise InputError(
                f"Reward `{self._name}` has the parameters {sorted(unknown)}, which are neither columns of the data "
                f"nor among {sorted(arguments)}. Further columns of the data: {sorted(columns - arguments) or 'none'}."
            )

    @property
    def trial(self) -> bool:
        return True

    @property
    def one_by_one(self) -> bool:
        return not self._is_batched

    def isolate(self) -> None:
        """Run the function in a separate process from now on.

        Raises:
            InputError: It was not given by its import path, so another process can't import it.
        """
        if self._path is None:
            raise InputError(
                f"`rollout.scoring.isolate`: reward `{self._name}` is a function object. Give its import path "
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
        _allow_sibling_imports(getattr(self._function, "__module__", None) or "")
        if not self._is_batched:
            return parse_outcomes([self._function(**self._arguments(s)) for s in batch], batch)
        rows = [self._arguments(s, batched=True) for s in batch]
        arguments: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        return parse_outcomes(self._function(**arguments), batch)

    def _arguments(self, sample: Sample, batched: bool = False) -> dict[str, Any]:
        values: dict[str, Any] = {**sample.columns, **{name: getattr(sample, name) for name in _ARGUMENTS}}
        if sample.tools is None and "tools" in sample.columns:
            values["tools"] = sample.columns["tools"]
        if batched:
            values |= {name: getattr(sample, field) if field else sample for name, field in _BATCH_ARGUMENTS.items()}
        return values if self._takes_all else {name: values[name] for name in self._parameters if name in values}


def import_function(path: str) -> Callable[..., Any]:
    """Import the function at `package.module.function` or `path/to/file.py:function`.

    Modules are also searched in the current directory; for a file, in its folder, as by `python file.py`.

    Raises:
        InputError: A part of the path was not found.
    """
    file, colon, name = path.partition(":")
    if colon:
        module = _import_file(path, file)
    else:
        dotted, _, name = path.rpartition(".")
        if not dotted:
            like = difflib.get_close_matches(path, list(_class_names(Reward)), n=1)
            raise InputError(
                f"`rollout.reward`: {path!r} is not an import path. Give package.module.function or "
                f"path/to/file.py:name{f', or did you mean {like[0]}?' if like else '.'}"
            )
        module = _import_module(path, dotted)
    if not hasattr(module, name):
        functions = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise InputError(
            f"`rollout.reward`: {path!r} not found: module {module.__name__!r} has no {name!r}. Its functions: "
            f"{', '.join(functions) or 'none'}."
        )
    function = getattr(module, name)
    if not callable(function):
        raise InputError(f"`rollout.reward`: {path!r} is {type(function).__name__}, not a function.")
    return function


def _import_module(path: str, dotted: str) -> Any:
    try:
        with _search_current_directory():
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


def _class_names(kind: Any) -> Iterator[str]:
    """Names of the rewards that derive from a class and can be made."""
    for derived in kind.__subclasses__():
        if not inspect.isabstract(derived):
            yield derived.__name__
        yield from _class_names(derived)


def _import_file(path: str, file: str) -> Any:
    location = Path(file)
    if not location.is_file():
        raise InputError(f"`rollout.reward`: {path!r} not found: there is no file {file!r}.")
    if location.suffix != ".py":
        raise InputError(f"`rollout.reward`: {file!r} is not a Python file.")
    from rlhf_pl.utils.by_path import import_path  # installs an import hook

    try:
        return import_path(file)
    except (Exception, SystemExit) as error:
        raise InputError(f"`rollout.reward`: running {file!r} failed: {type(error).__name__}: {error}.") from error


def _allow_sibling_imports(module: str) -> None:
    """Let a function from a file import the modules beside that file."""
    if by_path := sys.modules.get("rlhf_pl.utils.by_path"):
        by_path.prioritize_folder_of(module)


@contextmanager
def _search_current_directory() -> Iterator[None]:
    """Also search the current directory for modules in the block; the command line always does."""
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
