"""CRC-32C (Castagnoli), the check sum of Zarr's chunks: by google-crc32c where it is there, as with zarr."""

from __future__ import annotations

import functools
from typing import Any

try:
    import google_crc32c
except ImportError:  # the base install reads stores without it; only the short shard indexes are checked then
    google_crc32c = None  # type: ignore[assignment,unused-ignore]

_POLYNOMIAL = 0x82F63B78


def crc32c(data: Any) -> int:
    """The check sum of bytes or of a contiguous array."""
    if google_crc32c is None:
        return plain_crc32c(memoryview(data).cast("B"))
    return int(google_crc32c.value(data))


def plain_crc32c(data: bytes | memoryview) -> int:
    """The same in plain Python, a thousand times slower."""
    table, value = _table(), 0xFFFFFFFF
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


@functools.cache
def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table
