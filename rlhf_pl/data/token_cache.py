"""Token ids of a data set, kept on this machine: ranks and later runs read what the first one has made."""

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
    """Beside what `datasets` keeps, so that one setting (`HF_DATASETS_CACHE` or `HF_HOME`) moves both."""
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets") / "rlhf_pl_tokens"


def cached_table(key: str, make: Callable[[], pa.Table]) -> pa.Table:
    """The table that is kept under `key`; made and kept if there is none, or if it is damaged.

    Processes of one machine that ask for the same key wait for the first of them. Nothing is kept, and nothing fails,
    where the folder can't be written to.

    Args:
        key: Changes with everything that the table is made of; letters and digits.
        make: Makes it.
    """
    folder = cache_folder()
    with _alone(folder / f"{key}.lock"):
        found = _read(folder, key)
        if found is not None:
            return found
        table = make()
        with suppress(OSError, DiskFullError):
            _write(folder, key, table)
        return table


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Hold a lock that ends with this process; without one, where there are none, work is done twice and no more."""
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
    """A file's name holds its checksum; one that is damaged is removed."""
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
