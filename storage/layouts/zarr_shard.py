"""Layout `zarr`: a shard has one Zarr v3 shard file for each field, written as a stream and mapped through its index.

A file holds inner chunks of `rows_per_block` records, each followed by its crc32c, then the index: offset and size of
every chunk (uint64, little-endian), and the crc32c of the index. The last chunk of a draw is padded with zeros, as Zarr
requires; chunks after it are marked missing. The positions of chunks can be computed, so a batch is one gather. The
index must agree with them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from nfm.storage.format.fields import Field
from nfm.storage.layouts.mapped import Mapped, Shard, corrupt, map_file
from nfm.storage.layouts.tar_base import Array, stored

CRC = 4  # bytes
_ENTRY = 16  # bytes of the index for each chunk
_MISSING = 2**64 - 1


def shard_bytes(field: Field, records: int, rows_per_shard: int, rows_per_block: int) -> int:
    """Size in bytes of the file of a field."""
    chunks = -(-records // rows_per_block)
    return chunks * chunk_bytes(field, rows_per_block) + index_bytes(rows_per_shard, rows_per_block)


def record_offsets(fields: Sequence[Field], rows: Array, rows_per_block: int) -> dict[str, Array]:
    """The byte offsets of rows in the file of each field: int64 [n] for each field."""
    block, row = np.divmod(rows, rows_per_block)
    return {field.name: block * chunk_bytes(field, rows_per_block) + row * field.bytes_per_record for field in fields}


class MappedZarr(Shard):
    """The files of a shard as arrays, mapped into memory.

    Opening checks their sizes, the checksums of their indexes, and that every chunk is in its place. Raises
    MissingShard or CorruptShard.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        fields: Sequence[Field],
        records: int,
        rows_per_shard: int,
        rows_per_block: int,
    ) -> None:
        super().__init__(Path(paths[0]).parent, fields, records)
        self._rows = rows_per_block
        self._paths = {field.name: Path(path) for field, path in zip(fields, paths, strict=True)}
        self._chunks: dict[str, Array] = {}  # [chunks, rows, *shape], strided over the checksums
        for field in self.fields:
            self._map(field, rows_per_shard)

    def file_of(self, name: str) -> Path:
        return self._paths[name]

    def _read(self, name: str, start: int, stop: int) -> Array:
        field = next(field for field in self.fields if field.name == name)
        out = np.empty((stop - start, *field.shape), stored(field))
        at = start
        while at < stop:
            chunk, row = divmod(at, self._rows)
            taken = min(stop - at, self._rows - row)
            out[at - start : at - start + taken] = self._chunks[name][chunk, row : row + taken]
            at += taken
        return out

    def _map(self, field: Field, rows_per_shard: int) -> None:
        path, rows = self._paths[field.name], self._rows
        buffer = map_file(path, shard_bytes(field, self.records, rows_per_shard, rows), f"{self.records} records")
        chunks, stride = -(-self.records // rows), chunk_bytes(field, rows)
        expected = index_of([stride] * chunks, rows_per_shard // rows)
        if buffer[chunks * stride :] != expected:
            raise corrupt(path, f"its index does not place {chunks} chunks of {stride} bytes one behind the other")
        self.maps.append(Mapped.of(path, buffer))
        self.addresses[field.name] = self.maps[-1].address
        one = np.ndarray((rows, *field.shape), stored(field), buffer)
        self._chunks[field.name] = np.ndarray(
            (chunks, *one.shape), one.dtype, buffer, 0, (stride, field.bytes_per_record, *one.strides[1:])
        )


def crc32c(data: Any) -> bytes:
    """The crc32c checksum (Castagnoli) of bytes or of a contiguous array, as it is stored."""
    return struct.pack("<I", google_crc32c.value(data))


def chunk_bytes(field: Field, rows: int) -> int:
    """Size of a chunk, including its checksum."""
    return rows * field.bytes_per_record + CRC


def index_bytes(rows_per_shard: int, rows_per_block: int) -> int:
    """Size of the index of a shard."""
    return rows_per_shard // rows_per_block * _ENTRY + CRC


def index_of(sizes: Sequence[int], chunks: int) -> bytes:
    """The index of a shard of `chunks` chunks. The first ones have these sizes and lie one after the other."""
    index = np.full((chunks, 2), _MISSING, "<u8")
    index[: len(sizes), 1] = np.array(sizes, "<u8")
    index[: len(sizes), 0] = np.cumsum([0, *sizes[:-1]]) if sizes else 0
    data = index.tobytes()
    return data + crc32c(data)
