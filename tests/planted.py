"""Pickles that leave a mark when something unpickles them."""

import pickle
from pathlib import Path
from typing import Any


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "w")


def evil(mark: Path) -> Any:
    """An object whose pickle creates the file `mark` when it is read."""
    return _Evil(mark)


def raw(mark: Path) -> bytes:
    """Its plain pickle, as pickle, joblib, pandas and `.metadata` have it."""
    return pickle.dumps(evil(mark))


def saved(mark: Path, content: dict[str, Any] | None = None) -> bytes:
    """Its pickle inside of what `torch.save` writes, beside other content."""
    import io

    import torch

    file = io.BytesIO()
    torch.save({**(content or {}), "evil": evil(mark)}, file)
    return file.getvalue()


def array(mark: Path) -> bytes:
    """A `.npy` file of objects."""
    import io

    import numpy as np

    file = io.BytesIO()
    np.save(file, np.array([evil(mark)], dtype=object), allow_pickle=True)
    return file.getvalue()
