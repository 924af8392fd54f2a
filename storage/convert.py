"""Stored numbers to float32, once: uint8 images to the value range they stand for, float16 noise exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_FLOAT16_INFINITY = 0x7C00  # bits from here on are no finite number
_SIGN_EXPONENT_MANTISSA = np.int32(-0x70002000)  # 0x8FFFE000


def scale_of(value_range: tuple[float, float]) -> tuple[float, float]:
    """(a, b) such that a * v + b, in float32, takes the uint8 values v = 0..255 to the value range."""
    low, high = value_range
    return (high - low) / 255.0, low


def to_float32(
    stored: npt.NDArray[Any], value_range: tuple[float, float], out: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """float32 of the same shape, in `out` if given: uint8 goes to `value_range`, floats keep their values."""
    if out is None:
        out = np.empty(stored.shape, np.float32)
    if stored.dtype == np.uint8:
        a, b = scale_of(value_range)
        np.copyto(out, stored)
        np.multiply(out, np.float32(a), out=out)
        np.add(out, np.float32(b), out=out)
    elif stored.dtype == np.float16 and _finite(stored):
        _from_float16(stored, out)
    else:
        np.copyto(out, stored)
    return out


def _finite(stored: npt.NDArray[Any]) -> bool:
    if stored.size == 0:
        return False
    positive, negative = stored.view(np.int16).max(), stored.view(np.uint16).max()
    return bool(positive < _FLOAT16_INFINITY and negative < 0x8000 + _FLOAT16_INFINITY)


def _from_float16(stored: npt.NDArray[Any], out: npt.NDArray[np.float32]) -> None:
    """Finite float16 to float32 without rounding, twice as fast as numpy's own: the bits are moved to
    float32's places, sign included, and the product with 2^112 mends the exponent's offset (127 - 15),
    subnormals too.
    """
    bits = out.view(np.int32)
    np.copyto(bits, stored.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _SIGN_EXPONENT_MANTISSA, out=bits)
    np.multiply(out, np.float32(2.0**112), out=out)
