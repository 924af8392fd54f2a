"""Files mapped into the memory of this process."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nfm.storage.errors import CorruptShard, MissingShard, StorageError
from nfm.storage.files.small_files import plain
from nfm.storage.format.fields import ORIGIN, Field
from nfm.storage.layouts.seeded import Made

Array = npt.NDArray[Any]


class Mapped(NamedTuple):
    """The address and size of a mapped file."""

    path: Path
    address: int
    bytes: int

    @classmethod
    def of(cls, path: Path, buffer: mmap.mmap) -> Mapped:
        """The position of a map."""
        return cls(path, np.frombuffer(buffer, np.uint8).ctypes.data, len(buffer))


class Shard(ABC):
    """A shard open for reading: its files are mapped into memory, and nothing is read before it is asked for."""

    def __init__(self, path: str | Path, fields: Sequence[Field], records: int) -> None:
        self.path, self.fields, self.records = Path(path), tuple(fields), records
        self.maps: list[Mapped] = []  # of all files
        self.addresses: dict[str, int] = {}  # where the map of a field's file begins
        self.made: Made | None = None  # makes the noise, if it is not stored

    def __len__(self) -> int:
        return self.records

    def read(self, name: str, start: int, stop: int) -> Array:
        """Records start to stop of one field, in a new array [stop - start, *shape]."""
        if not 0 <= start <= stop <= self.records:
            raise StorageError(f"{self.path}: records {start} to {stop} asked for, it holds {self.records}")
        if self.made is not None and name == "noise":
            return self.made(self._read(ORIGIN, start, stop), [self.file_of(ORIGIN)], np.arange(start, stop))
        return self._read(name, start, stop)

    def file_of(self, name: str) -> Path:
        """The file that holds a field, for messages."""
        return self.path

    @abstractmethod
    def _read(self, name: str, start: int, stop: int) -> Array:
        """The records, which are there."""


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
    return CorruptShard(f"{path}: {what}; truncated or altered, run `nfm audit` on what it is of")
