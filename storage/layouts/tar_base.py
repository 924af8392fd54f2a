"""Writes the tar of a shard from batches of any size. Headers are ustar, so that offsets can be computed."""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self, cast

import numpy as np

from nfm.storage.errors import CorruptShard, StorageError, by
from nfm.storage.files.durable import HashingFile, StoredFile
from nfm.storage.files.paths import as_path
from nfm.storage.format.spec import Field, StoreSpec

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


class Blocker:
    """Checks records on their way to a file, and passes them on as blocks of `rows_per_block`; the last may be shorter.

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
        """The blocks that these n records fill. Each is valid until the next one is requested."""
        count = self._check(arrays)
        start = 0
        while start < count:
            taken = min(count - start, self._rows - self._held)
            self.taken += taken
            piece = {field.name: arrays[field.name][start : start + taken] for field in self._fields}
            start += taken
            if taken == self._rows:  # the batch is exactly one block: nothing to copy
                yield {f.name: np.ascontiguousarray(piece[f.name], stored(f)) for f in self._fields}
                continue
            self._collect(piece, taken)
            if self._held == self._rows:
                yield self._emptied()

    def rest(self) -> Iterator[dict[str, Array]]:
        """The last block, if it is short. Raises StorageError if records are missing."""
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
                    f"{self._path}: field {field.name!r} is {array.dtype} {by(array.shape)}, "
                    f"the shard holds {field.dtype} {by((count, *field.shape))}; convert it first"
                )
        if self.taken + count > self._records:
            raise StorageError(f"{self._path}: {self.taken + count} records, {self._records} were announced")
        return count


class TarWriter:
    """Writes one tar, block by block. The file gets its name only when all `records` records are durable.

    As a context manager it closes on a clean exit and leaves nothing behind after an error. Raises StorageError as
    `Blocker` does, and if the disk is full.
    """

    def __init__(self, path: str | Path, fields: Sequence[Field], records: int, rows_per_block: int) -> None:
        self.path = as_path(path)
        self.fields = tuple(fields)
        self.payload: StoredFile | None = None
        self._blocker = Blocker(self.path, self.fields, records, rows_per_block)
        self._file = HashingFile(self.path)

    def _write(self, block: Mapping[str, Array]) -> None:
        """Writes the members of one block."""
        raise NotImplementedError

    @property
    def written(self) -> int:
        """The number of records so far."""
        return self._blocker.taken

    def append(self, arrays: Mapping[str, Array]) -> None:
        """Adds n records: an array [n, *shape] of the right dtype for every field, and no other names."""
        for block in self._blocker.add(arrays):
            self._write(block)

    def close(self) -> StoredFile:
        """Publishes the shard. If records are missing it raises StorageError and leaves nothing behind."""
        if self.payload is None:
            try:
                for block in self._blocker.rest():
                    self._write(block)
                self._file.write(bytes(TAR_END))
            except StorageError:
                self.discard()
                raise
            self._file.publish()
            self.payload = self._file.stored
        return self.payload

    def discard(self) -> None:
        """Removes the temporary file."""
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
