"""Writes the tar of a shard from batches of any size. Headers are ustar, so that offsets can be computed."""

from __future__ import annotations

import io
import math
import tarfile
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from nfm.storage.errors import CorruptShard, StorageError, by
from nfm.storage.files.durable import HashingFile, StoredFile, Unfinished
from nfm.storage.files.paths import as_path
from nfm.storage.format.fields import Field
from nfm.storage.format.spec import StoreSpec

Array = np.ndarray[Any, np.dtype[Any]]
TAR_HEADER = 512
Stock = Iterator[tuple[str, Array]]  # what stock readers find in a shard: field, records [n, *shape]
TAR_END = 1024  # two empty headers end an archive


def stored(field: Field) -> np.dtype[Any]:
    """The dtype of a field on disk: little-endian."""
    return np.dtype(field.dtype).newbyteorder("<")


def strides(field: Field) -> tuple[int, ...]:
    """numpy's strides of one record, in bytes."""
    item = np.dtype(field.dtype).itemsize
    return tuple(item * math.prod(field.shape[axis + 1 :]) for axis in range(len(field.shape)))


def member_bytes(size: int) -> int:
    """The bytes that a member of `size` bytes takes in a tar: its header and its padded data."""
    return TAR_HEADER + size + -size % TAR_HEADER


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member, without time or owner. Raises StorageError if they cannot be written."""
    member = tarfile.TarInfo(name)
    member.size = size
    try:
        return member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    except (ValueError, UnicodeError) as error:
        raise StorageError(f"{name}: no ustar member ({error}); use a shorter key or smaller blocks") from error


class BlockWriter(Unfinished):
    """A shard being written from portions of any size, as blocks of `rows_per_block` records, the last one shorter.

    Raises StorageError for a wrong field, shape or dtype, for too many or too few records, and if the disk is full.
    """

    def __init__(self, path: str | Path, fields: Sequence[Field], records: int, rows_per_block: int) -> None:
        self.path, self.fields = as_path(path), tuple(fields)
        if records < 1 or rows_per_block < 1:
            raise StorageError(f"{self.path}: {records} records in blocks of {rows_per_block}; must be at least 1")
        self.written = 0  # the number of records so far
        self.files: list[StoredFile] = []  # once it is closed
        self._records = records
        self._rows = min(records, rows_per_block)
        self._held = 0
        self._buffers: dict[str, Array] = {}

    @abstractmethod
    def _write(self, block: Mapping[str, Array]) -> None:
        """Writes one block, which is valid until the next."""

    @abstractmethod
    def _finish(self) -> list[StoredFile]:
        """Writes what comes behind the last block, and makes all durable."""

    def append(self, arrays: Mapping[str, Array]) -> None:
        """Adds n records: an array [n, *shape] of the right dtype for every field, and no other names."""
        for block in self._full(arrays):
            self._write(block)

    def close(self) -> list[StoredFile]:
        """Publishes the shard: its tar, or its files in the order of the fields.

        If records are missing it raises StorageError and leaves nothing behind.
        """
        if not self.files:
            try:
                if self.written != self._records:
                    raise StorageError(f"{self.path}: {self.written} records, {self._records} were announced")
                if self._held:
                    self._write(self._emptied())
                self.files = self._finish()
            except StorageError:
                self.discard()
                raise
        return self.files

    def _full(self, arrays: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
        """The blocks that these n records fill."""
        count = self._check(arrays)
        start = 0
        while start < count:
            taken = min(count - start, self._rows - self._held)
            self.written += taken
            piece = {field.name: arrays[field.name][start : start + taken] for field in self.fields}
            start += taken
            if taken == self._rows:  # the batch is exactly one block: nothing to copy
                yield {f.name: np.ascontiguousarray(piece[f.name], stored(f)) for f in self.fields}
                continue
            self._collect(piece, taken)
            if self._held == self._rows:
                yield self._emptied()

    def _collect(self, piece: Mapping[str, Array], count: int) -> None:
        if not self._buffers:
            self._buffers = {f.name: np.empty((self._rows, *f.shape), stored(f)) for f in self.fields}
        for name, buffer in self._buffers.items():
            buffer[self._held : self._held + count] = piece[name]
        self._held += count

    def _emptied(self) -> dict[str, Array]:
        block = {name: buffer[: self._held] for name, buffer in self._buffers.items()}
        self._held = 0
        return block

    def _check(self, arrays: Mapping[str, Array]) -> int:
        names = {field.name for field in self.fields}
        if set(arrays) != names:
            raise StorageError(f"{self.path}: got the fields {sorted(arrays)}, the shard has {sorted(names)}")
        count = len(arrays[self.fields[0].name])
        for field in self.fields:
            array = arrays[field.name]
            if array.shape != (count, *field.shape) or array.dtype != np.dtype(field.dtype):
                raise StorageError(
                    f"{self.path}: field {field.name!r} is {array.dtype} {by(array.shape)}, "
                    f"the shard holds {field.dtype} {by((count, *field.shape))}; convert it first"
                )
        if self.written + count > self._records:
            raise StorageError(f"{self.path}: {self.written + count} records, {self._records} were announced")
        return count


class TarWriter(BlockWriter):
    """Writes one tar. The file gets its name only when all `records` records are durable."""

    def __init__(self, path: str | Path, fields: Sequence[Field], records: int, rows_per_block: int) -> None:
        super().__init__(path, fields, records, rows_per_block)
        self._file = HashingFile(self.path)

    def _finish(self) -> list[StoredFile]:
        self._file.write(bytes(TAR_END))
        self._file.close()
        return [self._file.stored]

    def discard(self) -> None:
        """Removes the temporary file."""
        self._file.discard()


class Text(NamedTuple):
    """A field that is stored as text: its bytes for each record, and a function from uint8 [n, bytes] to values [n]."""

    bytes: int
    parse: Callable[[Array], Array]


class TarLayout:
    """What the layouts have in common whose shard is one tar. The tar stays where it was written."""

    by_field = False
    holes = True

    def text(self, name: str) -> Text | None:
        """No field is stored as text."""
        return None

    def check(self, spec: StoreSpec) -> None:
        """All sizes are allowed."""

    def rows_per_block(self, spec: StoreSpec) -> int:
        """Blocks may have any size."""
        return spec.rows_per_block

    def placed(self, spec: StoreSpec, name: str) -> list[str]:
        """Sealing moves no file."""
        return []

    def metadata(self, spec: StoreSpec, draws: int) -> dict[str, bytes]:
        """None: stock readers need only the tars."""
        return {}

    def check_stock_reader(self) -> None:
        """Nothing to check: tarfile and numpy are always there."""


def stock_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, data) of every member of a tar, by tarfile. Raises CorruptShard for a member that is not a plain file."""
    size = path.stat().st_size
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not 0 <= member.size <= size:
                raise CorruptShard(f"the member {member.name!r} is no plain file of this archive")
            yield member.name, cast("IO[bytes]", archive.extractfile(member)).read()


def stock_array(data: bytes) -> Array:
    """The array of an npy file, by numpy. Raises what numpy raises, or CorruptShard."""
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise CorruptShard("a member is no npy file")
    return array
