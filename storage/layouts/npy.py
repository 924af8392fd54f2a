"""npy 1.0 headers of a fixed length (numpy.lib.format), so that the data begins at the same offset for any shape."""

from __future__ import annotations

from typing import Any

import numpy as np

from nfm.storage.errors import StorageError

NPY_HEADER = 128  # bytes


def npy_header(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header of a little-endian array of the field `name`. Raises StorageError if the shape is too long for it."""
    text = f"{{'descr': '{dtype.newbyteorder('<').str}', 'fortran_order': False, 'shape': {shape!r}, }}"
    room = NPY_HEADER - 10
    if len(text) >= room:
        raise StorageError(f"field {name!r}: the shape {shape} is too long for the header of its file; use fewer axes")
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1).encode("ascii") + b"\n"
