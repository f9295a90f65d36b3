"""Python files that are named by their path, as modules that every process can import.

A file becomes the submodule `rlhf_pl.utils.by_path.<name>_<its path in hexadecimal>`. So it is in `sys.modules`, where
dataclasses look for the names in postponed annotations; two files of the same name, or one that is called like an
installed module, are told apart; and what is pickled of it is found in processes that start anew (`spawn`,
`forkserver`), which import this package first.
"""

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import CodeType, ModuleType
from typing import Any

__path__: list[str] = []  # a package, whose modules the finder below finds
_PREFIX = f"{__name__}."
_sources: dict[str, str] = {}  # hash of the source that each module was made from
_folders: list[str] = []  # those that were put into sys.path
_behind: set[str] = set()  # those of them that hold a file which is called like an installed module
_held: dict[str, dict[str, ModuleType]] = {}  # by folder: modules of it whose names another folder's have now


def import_path(file: str) -> ModuleType:
    """The module of a Python file; run anew only if the file has changed.

    Its `__name__` is not `__main__`, so what a script does under that condition is left out.
    """
    path = os.path.abspath(file)
    stem = re.sub(r"\W", "_", os.path.basename(path).removesuffix(".py"))
    name = f"{_PREFIX}{stem}_{path.encode(errors='surrogateescape').hex()}"
    if name in sys.modules and _sources.get(name) != _hash(path):
        del sys.modules[name]
    return importlib.import_module(name)


def look_beside(module: str) -> None:
    """Before a function of such a module is called: let it import what lies beside its file."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if module.startswith(_PREFIX) and file is not None and [os.path.dirname(file)] != _folders[:1]:
        _find_beside(file)


def _hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(_PREFIX):
            return None
        file = bytes.fromhex(name.rpartition("_")[2]).decode(errors="surrogateescape")
        return spec_from_file_location(name, file, loader=_Loader(name, file))


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """From the source: bytecode that lies beside it may be of a version from the same second."""
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)

    def exec_module(self, module: ModuleType) -> None:
        _find_beside(self.path)
        _sources[module.__name__] = _hash(self.path)
        module.__package__ = ""  # so that relative imports fail as they do in `python file.py`
        super().exec_module(module)


def _find_beside(file: str) -> None:
    """Let a file import what lies beside it: its folder is the first of sys.path, as in `python file.py`.

    It is the last where the file is called like an installed module, which it would stand in the way of. Modules of
    other files' folders that are called like some of this one make way until theirs is the first again.
    """
    folder, name = os.path.split(file)
    others = [other for other in _folders if other != folder]
    for place in _folders:
        if place in sys.path:
            sys.path.remove(place)
    if _is_installed(name.removesuffix(".py")):
        _behind.add(folder)
    sys.path.insert(len(sys.path) if folder in _behind else 0, folder)
    sys.path.extend(others)
    _folders[:] = [folder, *others]
    for module in {name.partition(".")[0] for name in sys.modules}:
        if module != "rlhf_pl" and _lies_in(folder, module) and _folder_of(module) in others:
            held = _held.setdefault(_folder_of(module), {})
            for loaded in [n for n in sys.modules if n == module or n.startswith(f"{module}.")]:
                held[loaded] = sys.modules.pop(loaded)
    sys.modules.update(_held.pop(folder, {}))
    importlib.invalidate_caches()


def _is_installed(name: str) -> bool:
    paths = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
    return name in sys.stdlib_module_names or PathFinder.find_spec(name, paths) is not None


def _lies_in(folder: str, module: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, *parts)) for parts in ((f"{module}.py",), (module, "__init__.py")))


def _folder_of(module: str) -> str:
    """Where the file or the folder of a module is."""
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    folder = os.path.dirname(file)
    return os.path.dirname(folder) if os.path.basename(file) == "__init__.py" else folder


sys.meta_path.append(_Finder)
