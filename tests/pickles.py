"""Pickles that create a file when something unpickles them."""

import pickle
from pathlib import Path
from typing import Any


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "w")


def make_evil_object(mark: Path) -> Any:
    """An object whose pickle creates the file `mark` when it is loaded."""
    return _Evil(mark)


def make_pickle(mark: Path) -> bytes:
    """The object as a plain pickle, the format of pickle, joblib, pandas and `.metadata`."""
    return pickle.dumps(make_evil_object(mark))


def make_torch(mark: Path, content: dict[str, Any] | None = None) -> bytes:
    """A file of `torch.save` with the object beside other content."""
    import io

    import torch

    file = io.BytesIO()
    torch.save({**(content or {}), "evil": make_evil_object(mark)}, file)
    return file.getvalue()


def make_npy(mark: Path) -> bytes:
    """A `.npy` file with the object."""
    import io

    import numpy as np

    file = io.BytesIO()
    np.save(file, np.array([make_evil_object(mark)], dtype=object), allow_pickle=True)
    return file.getvalue()
