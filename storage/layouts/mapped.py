"""Files mapped into the memory of this process."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nfm.storage.errors import CorruptShard, MissingShard, StorageError
from nfm.storage.files.small_files import plain


class Mapped(NamedTuple):
    """The address and size of a mapped file."""

    path: Path
    address: int
    bytes: int

    @classmethod
    def of(cls, path: Path, buffer: mmap.mmap) -> Mapped:
        """The position of a map."""
        return cls(path, np.frombuffer(buffer, np.uint8).ctypes.data, len(buffer))


def map_file(path: Path, expected: int, what: str) -> mmap.mmap:
    """Maps a file for reading. It must have `expected` bytes, the size of `what`.

    Raises MissingShard, CorruptShard or StorageError.
    """
    try:
        with plain(path) as file:
            size = file.seek(0, 2)
            if size != expected or not size:
                raise corrupt(path, f"{size} bytes, {what} take {expected}")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise MissingShard(f"{path}: the shard is missing; run `nfm audit` on its store") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot read ({error.strerror}); check its permissions") from error


def corrupt(path: Path, what: str) -> CorruptShard:
    """The error for a shard whose bytes do not fit its layout."""
    return CorruptShard(f"{path}: {what}; truncated or altered, run `nfm audit` on its store")
