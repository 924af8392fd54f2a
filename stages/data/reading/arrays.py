"""The arrays of an .npz file: listed from their headers alone, and read in pieces."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from nfm.stages.base import StageError
from nfm.stages.data.source import check_unpacked, scratch_array
from nfm.storage.errors import by

UNREADABLE = (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)
PIECE_BYTES = 16 << 20


class Array(NamedTuple):
    """One array of a file; its values are not read."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype} {by(self.shape)})"


def arrays_of(file: Path) -> dict[str, Array]:
    """The arrays of an .npz file by name.

    Raises StageError if it is not such a file, or shorter than its headers say.
    """
    if file.is_file():
        with file.open("rb") as start:
            if start.read(6) == np.lib.format.MAGIC_PREFIX:
                raise StageError(
                    f"{file}: a single array, not an .npz file: np.savez(..., data=np.load(...)) puts it into one, "
                    "beside labels=... if there are any"
                )
    found: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    with archive.open(info) as stream:
                        array = _header(info.filename.removesuffix(".npy"), stream)
                        _check_size(file, array, info, stream.tell())
                        found[array.name] = array
    except UNREADABLE as error:
        raise _unreadable(file, "its arrays", error) from error
    return found


def read_whole(file: Path, array: Array) -> np.ndarray:
    """All values of a small array. Never unpickles."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return arrays[array.name]
    except UNREADABLE as error:
        raise _unreadable(file, f"array {array.name!r}", error) from error


def pieces(file: Path, array: Array, scratch: Path) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of an array in order, in memory that does not grow with the file.

    The caller may write to the pieces. An array in Fortran order is first unpacked to `scratch`, because its rows are
    scattered.
    """
    step = max(1, PIECE_BYTES // max(array.row_bytes, 1))
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{array.name}.npy") as stream:
            _header(array.name, stream)
            unpacked = _unpacked(array, stream, scratch) if array.fortran else None
            for start in range(0, array.shape[0], step):
                rows = min(step, array.shape[0] - start)
                if unpacked is None:
                    values = np.empty((rows, *array.shape[1:]), array.dtype)
                    _fill(values.reshape(-1).view(np.uint8).data, stream)
                else:
                    values = unpacked[start : start + rows].copy()
                yield start, values
            stream.read(1)  # to the end, so that the checksum is compared
    except UNREADABLE as error:
        raise _unreadable(file, f"array {array.name!r}", error) from error


def _header(name: str, stream: IO[bytes]) -> Array:
    read = np.lib.format.read_array_header_1_0
    if np.lib.format.read_magic(stream) != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return Array(name, shape, dtype, fortran and len(shape) > 1)


def _check_size(file: Path, array: Array, info: zipfile.ZipInfo, header: int) -> None:
    """Checks that the file is as long as the header says, before memory of that size is used."""
    promised = math.prod(array.shape) * array.dtype.itemsize
    if array.dtype.hasobject:
        return  # pickled: it may have any size and is never read
    if min(array.shape, default=0) < 0 or info.file_size != header + promised:
        raise StageError(
            f"{file}: array {array} is of {promised:,} bytes, the file has {info.file_size - header:,} of it: "
            "fetch the file anew"
        )
    check_unpacked(f"{file}: array {array}", info.compress_size, info.file_size)


def _unpacked(array: Array, stream: IO[bytes], scratch: Path) -> np.ndarray:
    """The array in a mapped file of `scratch`, written piece by piece."""
    raw = scratch_array(scratch, (array.shape[0] * array.row_bytes,), name="unpacked.raw")
    for start in range(0, len(raw), PIECE_BYTES):
        _fill(raw[start : start + PIECE_BYTES].data, stream)
    return raw.view(array.dtype).reshape(array.shape, order="F")


def _fill(view: memoryview, stream: IO[bytes]) -> None:
    while len(view):
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"{len(view):,} bytes are missing at its end")
        view = view[count:]


def _unreadable(file: Path, what: str, error: Exception) -> StageError:
    return StageError(f"{file}: {what} cannot be read ({error}): fetch the file anew")
