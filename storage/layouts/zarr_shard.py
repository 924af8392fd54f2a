"""Layout `zarr`: a shard is one Zarr v3 shard file a field, written as a stream and mapped through its index.

A file is inner chunks of `rows_per_block` records, each followed by its crc32c, then the index: offset and size of
every chunk (uint64, little-endian) and the index's own crc32c. The last chunk of a draw is padded with zeros, as Zarr
has it; chunks beyond it are marked missing. Uncompressed chunks lie where arithmetic says, so that a batch is one
gather; the index must say the same.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nfm.storage.errors import StorageError
from nfm.storage.files.small_files import plain
from nfm.storage.format.crc32c import crc32c
from nfm.storage.format.spec import Field
from nfm.storage.layouts.tar import Array, Mapped, corrupt, map_file, stored

CRC = 4  # bytes
_ENTRY = 16  # bytes of the index a chunk
_MISSING = 2**64 - 1
PCODEC_LEVEL = 8


def shard_bytes(field: Field, records: int, rows_per_shard: int, rows_per_block: int) -> int:
    """Size in bytes of the file of a field whose chunks are not compressed."""
    chunks = -(-records // rows_per_block)
    return chunks * chunk_bytes(field, rows_per_block) + index_bytes(rows_per_shard, rows_per_block)


def record_offsets(fields: Sequence[Field], rows: Array, rows_per_block: int) -> dict[str, Array]:
    """Byte offsets, int64 [n] by field: where rows of a shard begin in the field's own file."""
    block, row = np.divmod(rows, rows_per_block)
    return {field.name: block * chunk_bytes(field, rows_per_block) + row * field.bytes_per_record for field in fields}


class MappedZarr:
    """The files of a shard as arrays, mapped into memory.

    Opening checks their sizes, the check sums of their indexes and that every chunk is where it belongs. Raises
    MissingShard or CorruptShard. A field in `compressed` has no address: it is only read, chunk by chunk.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        fields: Sequence[Field],
        records: int,
        rows_per_shard: int,
        rows_per_block: int,
        compressed: Sequence[str] = (),
    ) -> None:
        self.fields = tuple(fields)
        self.records = records
        self.addresses: dict[str, int] = {}
        self.maps: list[Mapped] = []
        self._rows = rows_per_block
        self._paths = {field.name: Path(path) for field, path in zip(fields, paths, strict=True)}
        self._chunks: dict[str, Array] = {}  # [chunks, rows, *shape], strided over the check sums
        self._compressed: dict[str, tuple[mmap.mmap, Array]] = {}
        for field in self.fields:
            if field.name in compressed:
                self._open_compressed(field, rows_per_shard)
            else:
                self._map(field, rows_per_shard)

    def __len__(self) -> int:
        return self.records

    def read(self, name: str, start: int, stop: int) -> Array:
        """Records start to stop of one field, as a new array [stop - start, *shape]."""
        if not 0 <= start <= stop <= self.records:
            raise StorageError(f"{self._paths[name]}: records {start} to {stop} asked for, it holds {self.records}")
        field = next(field for field in self.fields if field.name == name)
        out = np.empty((stop - start, *field.shape), stored(field))
        at = start
        while at < stop:
            chunk, row = divmod(at, self._rows)
            taken = min(stop - at, self._rows - row)
            source = self._decompress(field, chunk) if name in self._compressed else self._chunks[name][chunk]
            out[at - start : at - start + taken] = source[row : row + taken]
            at += taken
        return out

    def bad_chunks(self, name: str) -> list[int]:
        """The chunks of a field whose check sum is not that of their bytes."""
        path, bad = self._paths[name], []
        with plain(path) as file:
            for chunk, (offset, size) in enumerate(self._places(name)):
                file.seek(offset)
                data = file.read(size)
                if data[-CRC:] != struct.pack("<I", crc32c(data[:-CRC])):
                    bad.append(chunk)
        return bad

    def _places(self, name: str) -> list[tuple[int, int]]:
        if name in self._compressed:
            return [(int(offset), int(size)) for offset, size in self._compressed[name][1]]
        stride = self._chunks[name].strides[0]
        return [(chunk * stride, stride) for chunk in range(len(self._chunks[name]))]

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

    def _open_compressed(self, field: Field, rows_per_shard: int) -> None:
        path, rows = self._paths[field.name], self._rows
        chunks, index = -(-self.records // rows), index_bytes(rows_per_shard, rows)
        buffer = map_file(path, None, f"{self.records} records")
        if len(buffer) < index:
            raise corrupt(path, f"{len(buffer)} bytes, its index alone takes {index}")
        tail = buffer[-index:]
        places = np.frombuffer(tail[: chunks * _ENTRY], "<u8").reshape(-1, 2)
        sizes = [min(int(size), len(buffer)) for size in places[:, 1]]
        if tail != index_of(sizes, rows_per_shard // rows) or sum(sizes) + index != len(buffer):
            raise corrupt(path, f"its index does not place {chunks} chunks one behind the other")
        self._compressed[field.name] = (buffer, places)

    def _decompress(self, field: Field, chunk: int) -> Array:
        buffer, places = self._compressed[field.name]
        offset, size = (int(value) for value in places[chunk])
        data = buffer[offset : offset + size]
        out = np.zeros((self._rows, *field.shape), field.dtype)
        if data[-CRC:] != struct.pack("<I", crc32c(data[:-CRC])):
            raise corrupt(self._paths[field.name], f"chunk {chunk} does not match its check sum")
        try:
            pcodec().decode(data[:-CRC], out.reshape(-1))
        except BaseException as error:  # a panic of pcodec's Rust is no Exception
            if isinstance(error, StorageError | KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise corrupt(self._paths[field.name], f"chunk {chunk} is no pcodec chunk ({error})") from error
        return out


def chunk_bytes(field: Field, rows: int) -> int:
    """Size of a chunk that is not compressed, its check sum included."""
    return rows * field.bytes_per_record + CRC


def index_bytes(rows_per_shard: int, rows_per_block: int) -> int:
    """Size of the index of a shard."""
    return rows_per_shard // rows_per_block * _ENTRY + CRC


def index_of(sizes: Sequence[int], chunks: int) -> bytes:
    """The index of a shard of `chunks` chunks, of which the first ones have these sizes and follow each other."""
    index = np.full((chunks, 2), _MISSING, "<u8")
    index[: len(sizes), 1] = np.array(sizes, "<u8")
    index[: len(sizes), 0] = np.cumsum([0, *sizes[:-1]]) if sizes else 0
    data = index.tobytes()
    return data + struct.pack("<I", crc32c(data))


def pcodec() -> Any:
    """numcodecs' codec of compressed chunks. Raises StorageError when its packages are missing."""
    try:
        from numcodecs.pcodec import PCodec
    except ImportError as error:
        raise StorageError(f"codec pcodec needs pcodec and numcodecs ({error}); install nfm-pairs[zarr]") from error
    return PCodec(level=PCODEC_LEVEL)
