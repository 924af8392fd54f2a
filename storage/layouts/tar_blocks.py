"""Layout `blocks`: a tar sample holds a block of records, and each field of a shard is still one strided array.

A tar sample holds its records as KEY.FIELD.npy, one member for each field, in a fixed order. Every member is a 512-byte
tar header, a 128-byte npy header and the array, padded to 512 bytes. So every offset can be computed. Only the last
block may be short.
"""

from __future__ import annotations

import mmap
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nfm.storage.errors import CorruptShard
from nfm.storage.format.fields import Field
from nfm.storage.format.spec import StoreSpec, parse_name, shard_name
from nfm.storage.layouts.mapped import Mapped, Shard, corrupt, map_file
from nfm.storage.layouts.npy import NPY_HEADER, npy_header
from nfm.storage.layouts.tar_base import (
    TAR_END,
    TAR_HEADER,
    Array,
    Stock,
    TarLayout,
    TarWriter,
    member_bytes,
    stock_array,
    stock_members,
    stored,
    strides,
    tar_header,
)


def shard_bytes(fields: Sequence[Field], records: int, rows_per_block: int = 256) -> int:
    """Size in bytes of a shard of `records` records."""
    full, rest = divmod(records, rows_per_block)
    return full * _block_bytes(fields, rows_per_block) + (_block_bytes(fields, rest) if rest else 0) + TAR_END


def record_offsets(fields: Sequence[Field], records: Array, rows: Array, rows_per_block: int = 256) -> dict[str, Array]:
    """The byte offset of row rows[i] in a shard of records[i] records: int64 [n] for each field."""
    block, row = np.divmod(rows, rows_per_block)
    whole = (int(block.max(initial=-1)) + 1) * rows_per_block <= records.min(initial=0)  # so one number is that of all
    in_block = rows_per_block if whole else np.minimum(records - block * rows_per_block, rows_per_block)
    first, ahead, offsets = block * _block_bytes(fields, rows_per_block), TAR_HEADER + NPY_HEADER, {}
    for field in fields:
        offsets[field.name] = first + (row * field.bytes_per_record + ahead)
        size = NPY_HEADER + in_block * field.bytes_per_record
        ahead = ahead + TAR_HEADER + size + -size % TAR_HEADER
    return offsets


class ShardWriter(TarWriter):
    """Writes one shard. The file gets its name only when all `records` records are durable.

    As a context manager it closes on a clean exit and leaves nothing behind after an error. Member names begin with
    `key`. Raises StorageError for a wrong field, shape or dtype, for too many or too few records, and if the disk is
    full.
    """

    def __init__(
        self, path: str | Path, fields: Sequence[Field], records: int, key: str, rows_per_block: int = 256
    ) -> None:
        super().__init__(path, fields, records, rows_per_block)
        self.key = key
        self._block = 0

    def _write(self, block: Mapping[str, Array]) -> None:
        for field in self.fields:
            data = block[field.name]
            size = NPY_HEADER + data.nbytes
            head = tar_header(f"{self.key}-b{self._block:05d}.{field.name}.npy", size) + npy_header(
                field.name, stored(field), data.shape
            )
            self._file.write(head)
            self._file.write(data.reshape(-1).view(np.uint8).data)
            self._file.write(bytes(-size % TAR_HEADER))
        self._block += 1


class MappedShard(Shard):
    """A shard as arrays, mapped into memory: data is read only on access.

    Opening checks the size, and the headers of the first and the last block. Raises MissingShard or CorruptShard.
    """

    def __init__(self, path: str | Path, fields: Sequence[Field], records: int, rows_per_block: int = 256) -> None:
        super().__init__(path, fields, records)
        # The last block is mapped separately even if it is full, so that all shards are handled the same.
        self._rows_per_block = min(rows_per_block, records)
        self._last = (records - 1) // self._rows_per_block
        expected = shard_bytes(self.fields, records, self._rows_per_block)
        buffer = map_file(self.path, expected, f"{records} records")
        self.maps = [Mapped.of(self.path, buffer)]
        self.addresses = dict.fromkeys((field.name for field in self.fields), self.maps[0].address)
        self._full: dict[str, Array] = {}
        self._tail: dict[str, Array] = {}
        self._map(buffer)

    def _read(self, name: str, start: int, stop: int) -> Array:
        out = np.empty((stop - start, *self._tail[name].shape[1:]), self._tail[name].dtype)
        at = start
        while at < stop:
            block, row = divmod(at, self._rows_per_block)
            source = self._tail[name] if block == self._last else self._full[name][block]
            taken = min(stop - at, self._rows_per_block - row)
            out[at - start : at - start + taken] = source[row : row + taken]
            at += taken
        return out

    def _map(self, buffer: mmap.mmap) -> None:
        rows, last = self._rows_per_block, self.records - self._last * self._rows_per_block
        stride = _block_bytes(self.fields, rows)
        first_at, last_at = 0, self._last * stride
        for field in self.fields:
            if self._last:
                self._check(buffer, first_at, field, rows)
            self._check(buffer, last_at, field, last)
            dtype, data = stored(field), TAR_HEADER + NPY_HEADER
            inner = (field.bytes_per_record, *strides(field))
            self._full[field.name] = np.ndarray(
                (self._last, rows, *field.shape), dtype, buffer, first_at + data, (stride, *inner)
            )
            self._tail[field.name] = np.ndarray((last, *field.shape), dtype, buffer, last_at + data)
            first_at += member_bytes(NPY_HEADER + rows * field.bytes_per_record)
            last_at += member_bytes(NPY_HEADER + last * field.bytes_per_record)

    def _check(self, buffer: mmap.mmap, at: int, field: Field, records: int) -> None:
        try:
            member = tarfile.TarInfo.frombuf(buffer[at : at + TAR_HEADER], "ascii", "strict")
        except (tarfile.HeaderError, UnicodeError) as error:
            raise corrupt(self.path, f"no tar header at byte {at} ({error})") from error
        header = buffer[at + TAR_HEADER : at + TAR_HEADER + NPY_HEADER]
        if not member.name.endswith(f".{field.name}.npy") or header != npy_header(
            field.name, stored(field), (records, *field.shape)
        ):
            raise corrupt(self.path, f"the member {member.name!r} at byte {at} is not {records} records of {field}")


def _block_bytes(fields: Sequence[Field], records: int) -> int:
    return sum(member_bytes(NPY_HEADER + records * field.bytes_per_record) for field in fields)


class Blocks(TarLayout):
    """The layout as an object for `LAYOUTS`, see `Layout`."""

    def writer(self, spec: StoreSpec, path: Path, name: str) -> ShardWriter:
        """Begins to write the shard `name`."""
        records = len(spec.slots_of(parse_name(name)[1]))
        return ShardWriter(path, spec.stored, records, name, spec.rows_per_block)

    def mapped(self, spec: StoreSpec, paths: Sequence[Path], records: int) -> MappedShard:
        """Maps a shard."""
        return MappedShard(paths[0], spec.stored, records, spec.rows_per_block)

    def offsets(self, fields: Sequence[Field], records: Array, rows: Array, rows_per_block: int) -> dict[str, Array]:
        """The offsets of rows, see `record_offsets`."""
        return record_offsets(fields, records, rows, rows_per_block)

    def shard_bytes(self, spec: StoreSpec, records: int) -> int:
        """Size in bytes of a shard's files."""
        return shard_bytes(spec.stored, records, spec.rows_per_block)

    def stock_arrays(self, spec: StoreSpec, files: Sequence[Path], draw: int, shard: int) -> Stock:
        """(field, records) by tarfile and numpy."""
        key, names = shard_name(draw, shard), {field.name for field in spec.stored}
        for name, data in stock_members(files[0]):
            match = re.fullmatch(rf"{key}-b\d{{5}}\.(\w+)\.npy", name)
            if match is None or match[1] not in names:
                raise CorruptShard(f"the member {name!r} is no block of {key}")
            yield match[1], stock_array(data)
