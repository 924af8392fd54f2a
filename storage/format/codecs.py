"""Codecs of the noise: floats, whole numbers of steps with values beyond their range clipped, or noise made again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nfm.storage.errors import StorageError


@dataclass(frozen=True)
class Codec:
    """How the noise is stored: its dtype, and for integer types the default `step`.

    `made`: not stored, but made when it is read, in the dtype of the codec.
    """

    dtype: str
    step: float | None = None
    made: bool = False

    @property
    def limit(self) -> int:
        """The largest number of steps, positive or negative. The lowest integer is not used, for symmetry."""
        return int(np.iinfo(self.dtype).max)


CODECS = {
    "float32": Codec("float32"),
    "float16": Codec("float16"),  # its error is 10 times below the rounding of an 8-bit image
    "int8": Codec("int8", 1 / 20),  # +-6.35
    "seeded": Codec("float32", made=True),  # a function of the seed, see layouts/seeded.py
}


def pack(noise: npt.NDArray[Any], codec: str, step: float | None = None) -> tuple[npt.NDArray[Any], int]:
    """(the noise as stored, same shape; the number of values clipped to the codec's range).

    `step` defaults to the codec's. A float codec stores values beyond its range as infinity. An integer codec raises
    StorageError for noise that is not finite.
    """
    kind = CODECS[codec]
    if kind.step is None:
        with np.errstate(over="ignore"):
            return np.asarray(noise).astype(kind.dtype, copy=False), 0
    with np.errstate(over="ignore"):  # such values are clipped and counted
        steps = np.asarray(noise, np.float32) * np.float32(1 / (step or kind.step))
    np.rint(steps, out=steps)
    clipped = 0
    if steps.size and not (-kind.limit <= steps.min() and steps.max() <= kind.limit):  # also false for NaN
        finite = np.isfinite(noise)
        if not finite.all():
            raise StorageError(f"{finite.size - np.count_nonzero(finite)} values of the noise are not finite")
        clipped = int(np.count_nonzero(np.abs(steps) > kind.limit))
        np.clip(steps, -kind.limit, kind.limit, out=steps)
    return steps.astype(kind.dtype), clipped


def unpack(stored: npt.NDArray[Any], step: float | None) -> npt.NDArray[np.float32]:
    """float32 of the same shape: floats keep their values, integers are multiplied by `step`."""
    values = np.asarray(stored).astype(np.float32)
    if step is not None:
        np.multiply(values, np.float32(step), out=values)
    return values
