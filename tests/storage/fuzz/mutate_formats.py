"""Tar headers, npy headers, Zarr indexes and Parquet parts with wrong contents but right checksums."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq

from .mutate_bytes import files_in, outside_name, raw_bytes


def tar_header(root: Path, outside: Path, rng: random.Random) -> str:
    """A member's header says something else, its checksum right."""
    tars = files_in(root, ".tar")
    if not tars:
        return raw_bytes(root, outside, rng)
    path = rng.choice(tars)
    data = bytearray(path.read_bytes())
    headers = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not headers:
        return raw_bytes(root, outside, rng)
    at = rng.choice(headers)
    what = rng.choice(("size", "name", "type", "magic", "prefix", "link", "mode", "swap"))
    if what == "size":
        sizes = (b"77777777777", b"00000000000", b"-0000000001", b"00000001000", b"99999999999", b"\x80" + b"\xff" * 10,
                 b"\xff" * 11, b"\x80" + bytes(3) + b"\x7f" + bytes(6))  # fmt: skip
        data[at + 124 : at + 135] = rng.choice(sizes)
    elif what == "name":
        name = rng.choice([outside_name(outside, rng), "a" * 100, "", "\0", "d000-s00000-b00000.image.npy", "x.pyd"])
        data[at : at + 100] = name.encode(errors="replace")[:100].ljust(100, b"\0")
    elif what == "type":
        data[at + 156] = rng.choice(b"0123456789LKSxgDMNV\0\xff")
    elif what == "magic":
        data[at + 257 : at + 265] = rng.choice((b"ustar  \0", b"ustar\x0099", bytes(8), b"GNUtar  "))
    elif what == "prefix":
        data[at + 345 : at + 365] = b"../../outside/x/y/z/"
    elif what == "link":
        data[at + 156] = ord(rng.choice("12"))
        data[at + 157 : at + 257] = outside_name(outside, rng).encode()[:100].ljust(100, b"\0")
    elif what == "mode":
        data[at + 100 : at + 148] = rng.randbytes(48)
    else:
        other = rng.choice(headers)
        data[at : at + 512], data[other : other + 512] = data[other : other + 512], data[at : at + 512]
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)
    return f"{path.name}: tar {what} at {at}"


_NPY = (
    "{'descr': '|O', 'fortran_order': False, 'shape': %s, }",
    "{'descr': '<f8', 'fortran_order': True, 'shape': %s, }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -6), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (9223372036854775807, 9223372036854775807), }",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (1000000000000,), }",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (0, 1, 2, 3), }",
    "{'descr': [('a', '|O'), ('b', '<i8')], 'fortran_order': False, 'shape': %s, }",
    "{'descr': '|V100000', 'fortran_order': False, 'shape': %s, }",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (1.5, True), }",
    "{'descr': '<f2', 'shape': %s, }",
    "__import__('os').system('true')",
    "((((((((((((((((((((((((((((((((((((((((((((((((((",
    "{'descr': '<f2', 'fortran_order': False, 'shape': %s, 'more': [[[[[[[[[[[[[[]]]]]]]]]]]]]], }",
)


def npy_header(root: Path, outside: Path, rng: random.Random) -> str:
    """An npy header of another shape, dtype, order, version or length, in a shard or in a field's file."""
    found = [(path, at) for path in files_in(root, ".tar", ".npy") for at in _magics(path.read_bytes())]
    if not found:
        return raw_bytes(root, outside, rng)
    path, at = rng.choice(found)
    data = bytearray(path.read_bytes())
    old = bytes(data[at + 10 : at + 128]).decode(errors="replace").strip()
    shape = old[old.find("(") : old.find(")") + 1] or "(2,)"
    what = rng.choice(("text", "text", "text", "version", "length", "digits"))
    if what == "text":
        text = rng.choice(_NPY)
        text = text % shape if "%s" in text else text
        data[at + 10 : at + 128] = text.encode()[:117].ljust(117) + b"\n"
    elif what == "version":
        data[at + 6 : at + 8] = rng.choice((b"\2\0", b"\3\0", b"\4\0", b"\0\0", b"\xff\xff"))
    elif what == "length":
        data[at + 8 : at + 10] = rng.choice((b"\0\0", b"\xff\xff", b"\1\0", b"\x77\0"))
    else:
        digits = [i for i in range(at + 10, at + 128) if data[i : i + 1].isdigit()]
        for i in rng.sample(digits, min(len(digits), 2)):
            data[i] = rng.choice(b"0123456789-")
    path.write_bytes(data)
    return f"{path.name}: npy {what} at {at}"


def _magics(data: bytes) -> list[int]:
    found, at = [], data.find(b"\x93NUMPY")
    while at >= 0:
        found.append(at)
        at = data.find(b"\x93NUMPY", at + 1)
    return found


def zarr_index(root: Path, outside: Path, rng: random.Random) -> str:
    """A shard's index sends readers elsewhere, its crc32c right; or chunks change under theirs."""
    shards = [path for path in files_in(root) if not path.suffix and "c" in path.parts[len(root.parts) :]]
    if not shards:
        return raw_bytes(root, outside, rng)
    path = rng.choice(shards)
    data = bytearray(path.read_bytes())
    chunks = rng.choice((1, 2, 3, (len(data) // 16) or 1))
    body = len(data) - 4 - 16 * chunks
    if body < 0:
        return raw_bytes(root, outside, rng)
    what = rng.choice(("offset", "size", "both", "empty", "overlap", "huge", "swap"))
    at = body + 16 * rng.randrange(chunks)
    big = (0, 1, len(data), len(data) - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)
    offset, size = struct.unpack_from("<QQ", data, at)
    if what in ("offset", "both", "huge"):
        offset = rng.choice(big)
    if what in ("size", "both", "huge"):
        size = rng.choice(big)
    if what == "empty":
        offset = size = 2**64 - 1
    if what == "overlap":
        offset = max(0, offset - rng.randrange(1, 9))
    if what == "swap":
        offset, size = size, offset
    struct.pack_into("<QQ", data, at, offset, size)
    data[-4:] = google_crc32c.value(bytes(data[body:-4])).to_bytes(4, "little")
    path.write_bytes(data)
    return f"{path.relative_to(root)}: index {what} of {chunks}"


def parquet(root: Path, outside: Path, rng: random.Random) -> str:
    """An index part with other columns, types, values or sizes."""
    parts = files_in(root, ".parquet")
    if not parts:
        return raw_bytes(root, outside, rng)
    path = rng.choice(parts)
    try:
        table = pq.ParquetFile(path.open("rb")).read()
    except (pa.ArrowException, OSError):
        return raw_bytes(root, outside, rng)
    column = rng.choice(table.column_names)
    at, count = table.column_names.index(column), table.num_rows
    what = rng.choice(("drop", "rename", "nulls", "more", "fewer", "type", "values", "empty", "nested", "double"))
    values: dict[str, Any] = {
        "nulls": pa.nulls(count),
        "type": pa.array([rng.choice(("x", "-1", "1e9"))] * count),
        "values": pa.array([rng.choice((-1, 0, 2**62, -(2**63), 5))] * count, pa.int64()),
        "nested": pa.array([[1, 2]] * count),
    }
    if what == "drop":
        table = table.drop_columns([column])
    elif what == "rename":
        table = table.rename_columns([f"{name}x" if name == column else name for name in table.column_names])
    elif what == "more":
        table = pa.concat_tables([table] * rng.choice((2, 1000)))
    elif what in ("fewer", "empty"):
        table = table.slice(0, 0 if what == "empty" else max(0, count - 1))
    elif what == "double":
        table = table.append_column(column, table[column])
    else:
        table = table.set_column(at, column, values[what])
    pq.write_table(table, path, compression=rng.choice(("zstd", "none")))
    return f"{path.name}: {what} {column}"
