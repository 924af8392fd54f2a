"""The fields of a record: names, dtypes and shapes of its arrays, and those that every pair has."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nfm.storage.errors import StorageError, by
from nfm.storage.format import untrusted
from nfm.storage.format.codecs import CODECS

ROLES = ("image", "noise", "label", "slot", "origin")
OF_BATCHES = ("image", "noise", "label", "slot", "draw", "store")  # every batch has them; no field of rows is so named
ORIGIN = "noise_origin"  # what shards keep of noise that is made: draw, slot and crc32c of each record's
IMAGE_DTYPES = ("uint8", "float16", "float32")
MOST_AXES = 16
MOST_RECORD = 1 << 28  # bytes of one record

_DTYPES = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)))
_DTYPES += ("float16", "float32", "float64")


@dataclass(frozen=True)
class Field:
    """One array of a record. `shape` and `dtype` (numpy's name) are those of a single record; `role` is its use."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", self.name):
            raise StorageError(
                f"field {untrusted.shown(self.name)}: a name is up to 40 lower case letters, digits and underscores"
            )
        where = f"field {self.name!r}:"
        untrusted.one_of(f"{where} role", self.role, ROLES)
        dtype = np.dtype(self.dtype).name if isinstance(self.dtype, np.dtype | type) else self.dtype
        untrusted.one_of(f"{where} dtype", dtype, _DTYPES)
        shape = untrusted.sequence(f"{where} shape", self.shape, MOST_AXES)
        object.__setattr__(self, "dtype", dtype)
        sizes = tuple(untrusted.integer(f"{where} a size of its shape", size, 1, 2**31) for size in shape)
        object.__setattr__(self, "shape", sizes)
        if self.bytes_per_record > MOST_RECORD:
            raise StorageError(f"{where} {self.bytes_per_record} bytes a record, {MOST_RECORD} at most")

    @cached_property
    def bytes_per_record(self) -> int:
        """Bytes of one record of this field, without headers."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def check_channels_first(where: str, image_shape: Sequence[int]) -> None:
    """Raises StorageError unless there are three sizes."""
    if len(image_shape) != 3:
        raise StorageError(f"{where}: image_shape {by(image_shape)}: give (channels, height, width), as (1, 28, 28)")


def pair_fields(
    image_shape: tuple[int, ...], codec: str = "float16", image_dtype: str = "uint8", label: bool = True
) -> tuple[Field, ...]:
    """The fields of a pair store, in their order: image, noise, label, slot."""
    stored = CODECS[codec].dtype if codec in CODECS else codec
    fields = [Field("image", image_dtype, image_shape, "image"), Field("noise", stored, image_shape, "noise")]
    if label:
        fields.append(Field("label", "int64", (), "label"))
    return (*fields, Field("slot", "int64", (), "slot"))
