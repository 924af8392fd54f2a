"""The members of a shard's tar: ustar headers and npy headers of a fixed length, so that offsets are arithmetic."""

from __future__ import annotations

import math
import mmap
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from nfm.storage.errors import CorruptShard, MissingShard, StorageError
from nfm.storage.files.atomic import HashingFile
from nfm.storage.files.paths import as_path
from nfm.storage.files.small_files import plain
from nfm.storage.format.spec import Field

Array = np.ndarray[Any, np.dtype[Any]]
TAR_HEADER = 512
NPY_HEADER = 128
TAR_END = 1024  # two empty headers end an archive


@dataclass(frozen=True)
class Payload:
    """A published file: where it is, its SHA-256 (hex) and its size in bytes."""

    path: Path
    sha256: str
    bytes: int


def stored(field: Field) -> np.dtype[Any]:
    """The dtype of a field on disk: little-endian."""
    return np.dtype(field.dtype).newbyteorder("<")


def strides(field: Field) -> tuple[int, ...]:
    """numpy's strides of one record, in bytes."""
    item = np.dtype(field.dtype).itemsize
    return tuple(item * math.prod(field.shape[axis + 1 :]) for axis in range(len(field.shape)))


def member_bytes(size: int) -> int:
    """What a member of `size` bytes takes in a tar: its header, and itself padded."""
    return TAR_HEADER + size + -size % TAR_HEADER


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member: no time, no owner. Raises StorageError when they cannot be written."""
    member = tarfile.TarInfo(name)
    member.size = size
    try:
        return member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    except (ValueError, UnicodeError) as error:
        raise StorageError(f"{name}: no ustar member ({error}); use a shorter key or smaller blocks") from error


def npy_header(field: Field, shape: tuple[int, ...]) -> bytes:
    """npy 1.0 (numpy.lib.format), padded to a fixed length so that offsets do not depend on the shape."""
    text = f"{{'descr': '{stored(field).str}', 'fortran_order': False, 'shape': {shape!r}, }}"
    room = NPY_HEADER - 10
    if len(text) >= room:
        raise StorageError(f"field {field.name!r}: the shape {field.shape} is too long for a shard's header")
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1).encode("ascii") + b"\n"


class Mapped(NamedTuple):
    """A file mapped into this process's memory."""

    path: Path
    address: int
    bytes: int

    @classmethod
    def of(cls, path: Path, buffer: mmap.mmap) -> Mapped:
        """Where the map of a file lies."""
        return cls(path, np.frombuffer(buffer, np.uint8).ctypes.data, len(buffer))


def map_file(path: Path, expected: int | None, what: str) -> mmap.mmap:
    """A file of `expected` bytes, mapped to be read; None: of any size but 0.

    Raises MissingShard, CorruptShard or StorageError.
    """
    try:
        with plain(path) as file:
            size = file.seek(0, 2)
            if size != (expected or size) or not size:
                raise corrupt(path, f"{size} bytes, {what} take {expected if expected is not None else 'more'}")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise MissingShard(f"{path}: the shard is missing; run `nfm audit` on its store") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot read ({error.strerror}); check its permissions") from error


def corrupt(path: Path, what: str) -> CorruptShard:
    """The error for a shard whose bytes are not those of its layout."""
    return CorruptShard(f"{path}: {what}; truncated or altered, run `nfm audit` on its store")


class Blocker:
    """Records on their way to a file: checked, and handed on as blocks of `rows_per_block`, the last one shorter.

    Raises StorageError for a wrong field, shape or dtype, and for too many or too few records.
    """

    def __init__(self, path: Path, fields: Sequence[Field], records: int, rows_per_block: int) -> None:
        if records < 1 or rows_per_block < 1:
            raise StorageError(f"{path}: {records} records in blocks of {rows_per_block}; must be at least 1")
        self.taken = 0
        self._path = path
        self._fields = tuple(fields)
        self._records = records
        self._rows = min(records, rows_per_block)
        self._held = 0
        self._buffers: dict[str, Array] = {}

    def add(self, arrays: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
        """The blocks that are full with these n records; each is valid until the next."""
        count = self._check(arrays)
        start = 0
        while start < count:
            taken = min(count - start, self._rows - self._held)
            self.taken += taken
            piece = {field.name: arrays[field.name][start : start + taken] for field in self._fields}
            start += taken
            if taken == self._rows:  # a whole block as it came: nothing to collect
                yield {f.name: np.ascontiguousarray(piece[f.name], stored(f)) for f in self._fields}
                continue
            self._collect(piece, taken)
            if self._held == self._rows:
                yield self._emptied()

    def rest(self) -> Iterator[dict[str, Array]]:
        """The last block where it is short. Raises StorageError when records are missing."""
        if self.taken != self._records:
            raise StorageError(f"{self._path}: {self.taken} records, {self._records} were announced")
        if self._held:
            yield self._emptied()

    def _collect(self, piece: Mapping[str, Array], count: int) -> None:
        if not self._buffers:
            self._buffers = {f.name: np.empty((self._rows, *f.shape), stored(f)) for f in self._fields}
        for name, buffer in self._buffers.items():
            buffer[self._held : self._held + count] = piece[name]
        self._held += count

    def _emptied(self) -> dict[str, Array]:
        block = {name: buffer[: self._held] for name, buffer in self._buffers.items()}
        self._held = 0
        return block

    def _check(self, arrays: Mapping[str, Array]) -> int:
        names = {field.name for field in self._fields}
        if set(arrays) != names:
            raise StorageError(f"{self._path}: got the fields {sorted(arrays)}, the shard has {sorted(names)}")
        count = len(arrays[self._fields[0].name])
        for field in self._fields:
            array = arrays[field.name]
            if array.shape != (count, *field.shape) or array.dtype != np.dtype(field.dtype):
                raise StorageError(
                    f"{self._path}: field {field.name!r} is {array.dtype} {array.shape}, "
                    f"the shard holds {field.dtype} {(count, *field.shape)}; convert it first"
                )
        if self.taken + count > self._records:
            raise StorageError(f"{self._path}: {self.taken + count} records, {self._records} were announced")
        return count


class TarWriter:
    """One tar being written, block by block; the file gets its name only when all `records` records are durable.

    As a context manager it closes on a clean exit and leaves nothing behind on an error. Raises StorageError as
    `Blocker` does, and when the disk is full.
    """

    def __init__(self, path: str | Path, fields: Sequence[Field], records: int, rows_per_block: int) -> None:
        self.path = as_path(path)
        self.fields = tuple(fields)
        self.payload: Payload | None = None
        self._blocker = Blocker(self.path, self.fields, records, rows_per_block)
        self._file = HashingFile(self.path)

    def _write(self, block: Mapping[str, Array]) -> None:
        """Writes the members of one block."""
        raise NotImplementedError

    @property
    def written(self) -> int:
        """Records so far."""
        return self._blocker.taken

    def append(self, arrays: Mapping[str, Array]) -> None:
        """Adds n records: for every field an array [n, *shape] of the field's dtype, and no other names."""
        for block in self._blocker.add(arrays):
            self._write(block)

    def close(self) -> Payload:
        """Publishes the shard. Raises StorageError, leaving nothing, when records are missing."""
        if self.payload is None:
            try:
                for block in self._blocker.rest():
                    self._write(block)
                self._file.write(bytes(TAR_END))
            except StorageError:
                self.discard()
                raise
            self._file.publish()
            self.payload = Payload(self.path, self._file.sha256, self._file.bytes)
        return self.payload

    def discard(self) -> None:
        """Gives up: removes the temporary file."""
        self._file.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()
