"""Converts stored numbers to float32: uint8 images to their value range, float16 exactly, int8 by its step.

Each conversion takes a few passes of numpy. The numbers are converted in chunks that stay in a core's cache, so that
one thread comes near the speed of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from nfm.storage.errors import by

CHUNK = 65536  # numbers: 256 KiB of float32 and their source fit into the second-level cache of recent cores
TORCH_CHUNK = 32704  # numbers: below torch's grain size of 32768, so it stays on the calling thread
FLOAT16_INFINITY = np.int32(0x7C00)  # the bits of its exponent: from here on, a number is not finite
SIGN_EXPONENT_MANTISSA = np.int32(-0x70002000)  # 0x8FFFE000
FLOAT16_BIAS = np.float32(2.0**112)

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


def scale_of(value_range: tuple[float, float]) -> tuple[float, float]:
    """(a, b) such that a * v + b, in float32, maps the uint8 values v = 0..255 to the value range."""
    low, high = value_range
    return (high - low) / 255.0, low


def linear(dtype: np.dtype[Any], value_range: tuple[float, float], step: float | None) -> tuple[float, float]:
    """(a, b) such that a stored v means a * v + b, in float32.

    uint8 is mapped to `value_range`. int8 and int16 are multiplied by `step` if there is one. All others keep their
    values.
    """
    if dtype == np.uint8:
        return scale_of(value_range)
    return (step if step is not None and dtype in (np.int8, np.int16) else 1.0), 0.0


def to_float32(
    stored: Array,
    value_range: tuple[float, float],
    out: Floats | None = None,
    step: float | None = None,
    *,
    torch: bool = False,
) -> Floats:
    """float32 of the same shape, in `out` if given. `out` must not overlap `stored`.

    The values are those of `linear`, those of float16 bit for bit. With `torch=True` torch converts float16, twice as
    fast and to the same bits, except that a signalling NaN becomes a quiet one. Use it if the consumer needs torch
    anyway.
    """
    if out is None:
        out = np.empty(stored.shape, np.float32)
    if out.shape != stored.shape or out.dtype != np.float32:
        raise ValueError(f"out is {out.dtype} {by(out.shape)}: pass float32 {by(stored.shape)}")
    if not (stored.flags.c_contiguous and out.flags.c_contiguous):
        flat = to_float32(np.ascontiguousarray(stored), value_range, None, step, torch=torch)
        np.copyto(out, flat)
    elif stored.dtype == np.float16 and torch:
        _from_float16_by_torch(stored, out)
    elif stored.dtype == np.float16:
        _from_float16(stored, out)
    else:
        _from_line(stored, out, *linear(stored.dtype, value_range, step))
    return out


def _from_line(stored: Array, out: Floats, a: float, b: float) -> None:
    for part, target in _chunks(stored, out, CHUNK):
        np.copyto(target, part)
        if a != 1:
            np.multiply(target, np.float32(a), out=target)
        if b:
            np.add(target, np.float32(b), out=target)


def _from_float16(stored: Array, out: Floats) -> None:
    """Float16 to float32 without rounding, twice as fast as numpy for finite values.

    The bits are moved to their places in float32, and a product with 2^112 corrects the exponent's offset (127 - 15),
    also for subnormals. This is wrong for infinities and NaNs, so numpy converts a chunk that has one.
    """
    for part, target in _chunks(stored, out, CHUNK):
        places, bits = part.view(np.int16), target.view(np.int32)
        if places.max() >= FLOAT16_INFINITY or part.view(np.uint16).max() >= 0x8000 + FLOAT16_INFINITY:
            np.copyto(target, part)
            continue
        np.copyto(bits, places)
        np.left_shift(bits, 13, out=bits)
        np.bitwise_and(bits, SIGN_EXPONENT_MANTISSA, out=bits)
        np.multiply(target, FLOAT16_BIAS, out=target)


def _from_float16_by_torch(stored: Array, out: Floats) -> None:
    from torch import from_numpy, get_num_threads

    if stored.size <= TORCH_CHUNK or get_num_threads() == 1:
        from_numpy(out).copy_(from_numpy(stored))
    else:
        parts = from_numpy(stored.reshape(-1)).split(TORCH_CHUNK)
        for part, target in zip(parts, from_numpy(out.reshape(-1)).split(TORCH_CHUNK)):
            target.copy_(part)


def _chunks(stored: Array, out: Floats, numbers: int) -> Iterator[tuple[Array, Floats]]:
    source, target = stored.reshape(-1), out.reshape(-1)  # contiguous, so these are views
    for start in range(0, source.size, numbers):
        yield source[start : start + numbers], target[start : start + numbers]
