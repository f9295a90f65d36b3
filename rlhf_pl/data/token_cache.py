"""Caches the token ids of a data set on this machine, for other ranks and later runs."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.constants import HF_HOME

from rlhf_pl.store.files import checksum, read_shard_file
from rlhf_pl.utils.disk import DiskFullError, write_atomically


def cache_folder() -> Path:
    """The cache folder, next to that of `datasets`, so that `HF_DATASETS_CACHE` or `HF_HOME` moves both."""
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets") / "rlhf_pl_tokens"


def load_or_make_table(key: str, make: Callable[[], pa.Table]) -> pa.Table:
    """Load the cached table of a key; make and cache it if it is missing or damaged.

    Processes of one machine that request the same key wait for the first of them. If the folder is not writable, the
    table is made without caching.

    Args:
        key: A hash of everything that the table depends on; letters and digits.
        make: Makes the table.
    """
    folder = cache_folder()
    with _hold_lock(folder / f"{key}.lock"):
        found = _read(folder, key)
        if found is not None:
            return found
        table = make()
        with suppress(OSError, DiskFullError):
            _write(folder, key, table)
        return table


@contextmanager
def _hold_lock(file: Path) -> Iterator[None]:
    """Hold a file lock, which is released if this process dies.

    On file systems without locks, several processes may do the same work.
    """
    lock = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        pass
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _read(folder: Path, key: str) -> pa.Table | None:
    """Read a cached table, whose file name contains its checksum; remove damaged files."""
    for file in folder.glob(f"{key}-*.parquet"):
        with suppress(OSError, pa.ArrowException):
            content = read_shard_file(file)
            if content is not None:
                return pq.read_table(pa.BufferReader(content))
        with suppress(OSError):
            file.unlink()
    return None


def _write(folder: Path, key: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content = sink.getvalue()
    write_atomically(folder / f"{key}-{checksum(content)}.parquet", lambda file: file.write(content), content.size)
