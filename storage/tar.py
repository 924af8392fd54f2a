"""Shards: plain ustar files that are also strided arrays (layout `blocks`).

A tar sample holds a block of records as KEY.FIELD.npy, one member a field, in a fixed order. Every member is
a 512-byte tar header, a 128-byte npy header and the array, padded to 512 bytes, so that every offset is
arithmetic and a mapped shard is one strided array a field. Only the last block may be short.
"""

from __future__ import annotations

import mmap
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from nfm.storage.atomic import HashingFile
from nfm.storage.errors import CorruptShard, MissingShard, StorageError
from nfm.storage.schema import Field

Array = np.ndarray[Any, np.dtype[Any]]
TAR_HEADER = 512
NPY_HEADER = 128
TAR_END = 1024  # two empty headers end an archive
_LARGE_RECORD = 4096  # bytes; from here on, copying row by row beats numpy's gather, which copies twice


@dataclass(frozen=True)
class Payload:
    """A published file: where it is, its SHA-256 (hex) and its size in bytes."""

    path: Path
    sha256: str
    bytes: int


def shard_bytes(fields: Sequence[Field], records: int, rows_per_block: int = 256) -> int:
    """Size in bytes of a shard of `records` records."""
    full, rest = divmod(records, rows_per_block)
    return full * _block_bytes(fields, rows_per_block) + (_block_bytes(fields, rest) if rest else 0) + TAR_END


def record_offsets(fields: Sequence[Field], records: Array, rows: Array, rows_per_block: int = 256) -> dict[str, Array]:
    """Byte offsets, int64 [n] by field: where row rows[i] of a shard of records[i] records begins."""
    block, row = np.divmod(rows, rows_per_block)
    in_block = np.minimum(records - block * rows_per_block, rows_per_block)
    at = block * _block_bytes(fields, rows_per_block) + TAR_HEADER + NPY_HEADER
    offsets = {}
    for field in fields:
        offsets[field.name] = at + row * field.bytes_per_record
        size = NPY_HEADER + in_block * field.bytes_per_record
        at = at + TAR_HEADER + size + -size % TAR_HEADER
    return offsets


class ShardWriter:
    """Writes one shard; the file gets its name only when all `records` records are durable.

    As a context manager it closes on a clean exit and leaves nothing behind on an error. `key` prefixes the
    names of the members. Raises StorageError for a wrong field, shape or dtype, for too many or too few
    records, and when the disk is full.
    """

    def __init__(
        self, path: str | Path, fields: Sequence[Field], records: int, key: str, rows_per_block: int = 256
    ) -> None:
        if records < 1 or rows_per_block < 1:
            raise StorageError(f"{path}: {records} records in blocks of {rows_per_block}; must be at least 1")
        self.path = Path(path)
        self.fields = tuple(fields)
        self.records = records
        self.key = key
        self.written = 0
        self.payload: Payload | None = None
        self._block = 0
        self._held = 0
        rows = min(records, rows_per_block)
        self._buffers = {f.name: np.empty((rows, *f.shape), _stored(f)) for f in self.fields}
        self._rows_per_block = rows
        self._file = HashingFile(self.path)

    def append(self, arrays: Mapping[str, Array]) -> None:
        """Adds n records: for every field an array [n, *shape] of the field's dtype, and no other names."""
        names = {field.name for field in self.fields}
        if set(arrays) != names:
            raise self._wrong(f"got the fields {sorted(arrays)}, the shard has {sorted(names)}")
        count = len(arrays[self.fields[0].name])
        for field in self.fields:
            array = arrays[field.name]
            if array.shape != (count, *field.shape) or array.dtype != np.dtype(field.dtype):
                raise self._wrong(
                    f"field {field.name!r} is {array.dtype} {array.shape}, "
                    f"the shard holds {field.dtype} {(count, *field.shape)}; convert it first"
                )
        if self.written + count > self.records:
            raise self._wrong(f"{self.written + count} records, {self.records} were announced")
        start = 0
        while start < count:
            taken = min(count - start, self._rows_per_block - self._held)
            for name, buffer in self._buffers.items():
                buffer[self._held : self._held + taken] = arrays[name][start : start + taken]
            start += taken
            self._held += taken
            self.written += taken
            if self._held == self._rows_per_block:
                self._flush()

    def close(self) -> Payload:
        """Publishes the shard. Raises StorageError, leaving nothing, when records are missing."""
        if self.payload is None:
            if self.written != self.records:
                self.discard()
                raise self._wrong(f"{self.written} records, {self.records} were announced")
            if self._held:
                self._flush()
            self._file.write(bytes(TAR_END))
            self._file.publish()
            self.payload = Payload(self.path, self._file.sha256, self._file.bytes)
        return self.payload

    def discard(self) -> None:
        """Gives up: removes the temporary file."""
        self._file.discard()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _flush(self) -> None:
        for field in self.fields:
            data = self._buffers[field.name][: self._held]
            size = NPY_HEADER + data.nbytes
            self._file.write(_tar_header(f"{self.key}-b{self._block:05d}.{field.name}.npy", size))
            self._file.write(_npy_header(field, self._held))
            self._file.write(data.reshape(-1).view(np.uint8).data)
            self._file.write(bytes(-size % TAR_HEADER))
        self._block += 1
        self._held = 0

    def _wrong(self, what: str) -> StorageError:
        return StorageError(f"{self.path}: {what}")


class MappedShard:
    """A shard as arrays, mapped into memory: nothing is read before it is asked for.

    Opening checks the size and the headers of the first and the last block. Raises MissingShard or
    CorruptShard.
    """

    def __init__(self, path: str | Path, fields: Sequence[Field], records: int, rows_per_block: int = 256) -> None:
        self.path = Path(path)
        self.fields = tuple(fields)
        self.records = records
        # The last block is mapped on its own, full or not: one path for every shard.
        self._rows_per_block = min(rows_per_block, records)
        self._last = (records - 1) // self._rows_per_block
        expected = shard_bytes(self.fields, records, self._rows_per_block)
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, 2)
                if size != expected:
                    raise self._corrupt(f"{size} bytes, {records} records take {expected}")
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise MissingShard(f"{self.path}: the shard is missing; run `nfm audit` on its store") from error
        except OSError as error:
            raise StorageError(f"{self.path}: cannot read ({error.strerror}); check its permissions") from error
        self.memory: Array = np.frombuffer(buffer, np.uint8)
        self.address = self.memory.ctypes.data
        self._full: dict[str, Array] = {}
        self._tail: dict[str, Array] = {}
        self._map(buffer)

    def __len__(self) -> int:
        return self.records

    def read(self, name: str, start: int, stop: int) -> Array:
        """Records start to stop of one field, as a new array [stop - start, *shape]."""
        if not 0 <= start <= stop <= self.records:
            raise StorageError(f"{self.path}: records {start} to {stop} asked for, it holds {self.records}")
        out = np.empty((stop - start, *self._tail[name].shape[1:]), self._tail[name].dtype)
        at = start
        while at < stop:
            block, row = divmod(at, self._rows_per_block)
            source = self._tail[name] if block == self._last else self._full[name][block]
            taken = min(stop - at, self._rows_per_block - row)
            out[at - start : at - start + taken] = source[row : row + taken]
            at += taken
        return out

    def gather(self, name: str, rows: Array, out: Array | None = None) -> Array:
        """The records `rows` (any order) of one field, as [n, *shape]; into `out` where given."""
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.records):
            raise StorageError(f"{self.path}: records {rows.min()} to {rows.max()} asked for, it holds {self.records}")
        tail, full = self._tail[name], self._full[name]
        block, row = np.divmod(rows, self._rows_per_block)
        late = block == self._last
        if out is None:
            out = np.empty((len(rows), *tail.shape[1:]), tail.dtype)
        if tail[0].nbytes >= _LARGE_RECORD:
            for i, (b, r) in enumerate(zip(block.tolist(), row.tolist())):
                out[i] = tail[r] if b == self._last else full[b, r]
        elif not late.any():
            out[...] = full[block, row]
        elif late.all():
            out[...] = tail[row]
        else:
            out[late] = tail[row[late]]
            out[~late] = full[block[~late], row[~late]]
        return out

    def _map(self, buffer: mmap.mmap) -> None:
        rows, last = self._rows_per_block, self.records - self._last * self._rows_per_block
        stride = _block_bytes(self.fields, rows)
        first_at, last_at = 0, self._last * stride
        for field in self.fields:
            if self._last:
                self._check(buffer, first_at, field, rows)
            self._check(buffer, last_at, field, last)
            dtype, data = _stored(field), TAR_HEADER + NPY_HEADER
            inner = np.empty((1, *field.shape), dtype).strides
            self._full[field.name] = np.ndarray(
                (self._last, rows, *field.shape), dtype, buffer, first_at + data, (stride, *inner)
            )
            self._tail[field.name] = np.ndarray((last, *field.shape), dtype, buffer, last_at + data)
            first_at += _member_bytes(field, rows)
            last_at += _member_bytes(field, last)

    def _check(self, buffer: mmap.mmap, at: int, field: Field, records: int) -> None:
        try:
            member = tarfile.TarInfo.frombuf(buffer[at : at + TAR_HEADER], "ascii", "strict")
        except (tarfile.HeaderError, UnicodeError) as error:
            raise self._corrupt(f"no tar header at byte {at} ({error})") from error
        header = buffer[at + TAR_HEADER : at + TAR_HEADER + NPY_HEADER]
        if not member.name.endswith(f".{field.name}.npy") or header != _npy_header(field, records):
            raise self._corrupt(f"the member {member.name!r} at byte {at} is not {records} records of {field}")

    def _corrupt(self, what: str) -> CorruptShard:
        return CorruptShard(f"{self.path}: {what}; truncated or altered, run `nfm audit` on its store")


def _stored(field: Field) -> np.dtype[Any]:
    return np.dtype(field.dtype).newbyteorder("<")


def _member_bytes(field: Field, records: int) -> int:
    size = NPY_HEADER + records * field.bytes_per_record
    return TAR_HEADER + size + -size % TAR_HEADER


def _block_bytes(fields: Sequence[Field], records: int) -> int:
    return sum(_member_bytes(field, records) for field in fields)


def _tar_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    try:
        return member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    except (ValueError, UnicodeError) as error:
        raise StorageError(f"{name}: no ustar member ({error}); use a shorter key or smaller blocks") from error


def _npy_header(field: Field, records: int) -> bytes:
    """npy 1.0 (numpy.lib.format), padded to a fixed length so that offsets do not depend on the shape."""
    shape = (records, *field.shape)
    text = f"{{'descr': '{_stored(field).str}', 'fortran_order': False, 'shape': {shape!r}, }}"
    room = NPY_HEADER - 10
    if len(text) >= room:
        raise StorageError(f"field {field.name!r}: the shape {field.shape} is too long for a shard's header")
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1).encode("ascii") + b"\n"
