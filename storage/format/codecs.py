"""Codecs of the noise: floats as they are, or whole numbers of steps, with what exceeds their range clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nfm.storage.errors import StorageError


@dataclass(frozen=True)
class Codec:
    """The dtype of the stored noise; `step` is the default step of those that store whole numbers of steps."""

    dtype: str
    step: float | None = None

    @property
    def limit(self) -> int:
        """The largest number of steps, of either sign: the lowest integer is left out, for symmetry."""
        return int(np.iinfo(self.dtype).max)


CODECS = {
    "float16": Codec("float16"),  # error 10 times below the 8-bit image's own rounding
    "float32": Codec("float32"),
    "int8": Codec("int8", 1 / 20),  # +-6.35
}


def pack(noise: npt.NDArray[Any], codec: str, step: float | None = None) -> tuple[npt.NDArray[Any], int]:
    """(the noise as stored, same shape; how many values were clipped to the codec's range).

    `step` defaults to the codec's. What a float codec cannot hold becomes infinite; a codec of steps raises
    StorageError for noise that is not finite.
    """
    kind = CODECS[codec]
    if kind.step is None:
        with np.errstate(over="ignore"):
            return np.asarray(noise).astype(kind.dtype, copy=False), 0
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
    """float32 of the same shape: floats keep their values, steps become `step` times their number."""
    values = np.asarray(stored).astype(np.float32)
    if step is not None:
        np.multiply(values, np.float32(step), out=values)
    return values
