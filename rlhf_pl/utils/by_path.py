"""Imports Python files by path, as modules that every process can import.

A file becomes the submodule `rlhf_pl.utils.by_path.<name>_<its path in hexadecimal>`. It is then in `sys.modules`,
which dataclasses need to resolve postponed annotations. Its name differs from that of an installed module and of
another file with the same name. New processes (`spawn`, `forkserver`) import this package first, so they can unpickle
its objects.
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

__path__: list[str] = []  # makes this a package, whose submodules the finder below finds
_PREFIX = f"{__name__}."
_sources: dict[str, str] = {}  # hash of each module's source
_folders: list[str] = []  # folders that were added to sys.path
_last_folders: set[str] = set()  # folders with a file named like an installed module: at the end of sys.path
_displaced: dict[str, dict[str, ModuleType]] = {}  # by folder: modules replaced by those of another folder


def import_path(file: str) -> ModuleType:
    """Import a Python file; a file that was imported before is executed again only if it has changed.

    Its `__name__` is not `__main__`, so code under that condition does not run.
    """
    path = os.path.abspath(file)
    stem = re.sub(r"\W", "_", os.path.basename(path).removesuffix(".py"))
    name = f"{_PREFIX}{stem}_{path.encode(errors='surrogateescape').hex()}"
    if name in sys.modules and _sources.get(name) != _hash(path):
        del sys.modules[name]
    return importlib.import_module(name)


def prioritize_folder_of(module: str) -> None:
    """Let a module of this package import the files in its folder. Called before its functions are."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if module.startswith(_PREFIX) and file is not None and [os.path.dirname(file)] != _folders[:1]:
        _prioritize_folder(file)


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
        """Compile the source: cached bytecode may be of another version from the same second."""
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)

    def exec_module(self, module: ModuleType) -> None:
        _prioritize_folder(self.path)
        _sources[module.__name__] = _hash(self.path)
        module.__package__ = ""  # so that relative imports fail as they do in `python file.py`
        super().exec_module(module)


def _prioritize_folder(file: str) -> None:
    """Put a file's folder first in sys.path, as `python file.py` does.

    Put it last if the file is named like an installed module, which it would hide. Loaded modules of other folders
    with the name of a module in this folder are removed from `sys.modules`, until their folder is first again.
    """
    folder, name = os.path.split(file)
    others = [other for other in _folders if other != folder]
    for added in _folders:
        if added in sys.path:
            sys.path.remove(added)
    if _is_installed(name.removesuffix(".py")):
        _last_folders.add(folder)
    sys.path.insert(len(sys.path) if folder in _last_folders else 0, folder)
    sys.path.extend(others)
    _folders[:] = [folder, *others]
    for module in {name.partition(".")[0] for name in sys.modules}:
        if module != "rlhf_pl" and _has_module(folder, module) and _folder_of(module) in others:
            displaced = _displaced.setdefault(_folder_of(module), {})
            for loaded in [n for n in sys.modules if n == module or n.startswith(f"{module}.")]:
                displaced[loaded] = sys.modules.pop(loaded)
    sys.modules.update(_displaced.pop(folder, {}))
    importlib.invalidate_caches()


def _is_installed(name: str) -> bool:
    paths = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
    return name in sys.stdlib_module_names or PathFinder.find_spec(name, paths) is not None


def _has_module(folder: str, module: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, *parts)) for parts in ((f"{module}.py",), (module, "__init__.py")))


def _folder_of(module: str) -> str:
    """The folder that contains a module's file or package."""
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    folder = os.path.dirname(file)
    return os.path.dirname(folder) if os.path.basename(file) == "__init__.py" else folder


sys.meta_path.append(_Finder)
