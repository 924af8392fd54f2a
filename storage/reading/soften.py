"""Softening: z' = sqrt(1 - rho^2) z + rho eps mixes new noise into stored noise while it is read.

rho = 0 is the coupling of the store, rho -> 1 the independent one. If z has unit variance, so has z'. The eps of a
record is a function of (seed, store, draw, slot) and of the epoch only. So it is the same for any world size, batch
size or number of workers, and after a resume. Every epoch has a new one.

The normals are Box-Muller on 31-bit uniforms in float32. This takes less than half the time of `philox.normals` in
float64, whose exact bytes stores depend on. |eps| stays below 6.7. The series are exact to float32's rounding and use
only operations that IEEE 754 rounds the same everywhere.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nfm.storage.format.philox import raw
from nfm.storage.reading.stream import Records

_CHUNK_PAIRS = 16384  # normals computed at a time: float32 temporaries fit into a core's cache
_STORE_BIT = 48  # the counter's last word: the epoch below this bit, the number of the mixture's member above it
# log m = 2 f (1 + s/3 + s^2/5 + ...) with f = (m - 1) / (m + 1), s = f^2 <= 0.0295
_LOG = [2.0 / (2 * k + 1) for k in range(5)]
# Taylor series on [-pi/2, pi/2]; the first term left out is below 1e-7
_SIN = [(-1.0) ** k / math.factorial(2 * k + 1) for k in range(6)]
_COS = [(-1.0) ** k / math.factorial(2 * k) for k in range(7)]
_SQRT_HALF = np.int32(0x3F3504F3)  # the bits of sqrt(1/2)

Float32 = npt.NDArray[np.float32]


class Softener:
    """Softens the noise of records in place, for one `seed` and one rho in (0, 1)."""

    def __init__(self, rho: float, seed: int) -> None:
        self._rho = np.float32(rho)
        self._keep = np.float32(math.sqrt(1 - rho**2))
        self._seed = seed

    def __call__(self, noise: Float32, records: Records) -> None:
        """noise: float32 [n, ...] of these records; it becomes z'."""
        size = math.prod(noise.shape[1:])
        flat = noise.reshape(len(noise), size)
        rows = max(1, 2 * _CHUNK_PAIRS // max(1, size))
        for start in range(0, len(flat), rows):
            part = slice(start, start + rows)
            eps = normals(self._seed, records.take(part), size)
            eps *= self._rho
            flat[part] *= self._keep
            flat[part] += eps


def normals(seed: int, records: Records, size: int) -> Float32:
    """eps of the records: standard normals, float32 [n, size]."""
    counters = np.zeros((len(records.slot), 4), np.uint64)
    counters[:, 1], counters[:, 2] = records.slot, records.draw
    counters[:, 3] = records.epoch + (records.store << _STORE_BIT)
    bits = raw(seed, "soften", counters, -(-size // 2))
    out = np.empty((len(bits), size), np.float32)
    _box_muller(bits, out)
    return out


def _box_muller(bits: npt.NDArray[np.uint64], out: Float32) -> None:
    """Fills out [n, size] from bits [n, size / 2]: the first 32-bit halves give radii, the others angles.

    As in `philox.box_muller`, with the cosines before the sines. Works in place, because memory traffic takes most of
    the time.
    """
    cosines = bits.shape[1]
    halves = bits.astype("<u8", copy=False).view("<u4")
    radius = _radius((halves[:, :cosines] >> np.uint32(1)).view(np.int32))
    angles = halves[:, cosines:]
    mirror = angles & np.uint32(2**31)  # the top bit of an angle covers the other half of the circle
    word = angles & np.uint32(2**31 - 1)
    angle = word.view(np.int32).astype(np.float32)
    angle *= np.float32(math.pi / 2**31)
    angle -= np.float32(math.pi / 2)
    square = angle * angle
    wave = _horner(_COS, square)
    flipped = wave.view(np.uint32)
    flipped ^= mirror
    np.multiply(wave, radius, out=out[:, :cosines])
    wave = _horner(_SIN, square)
    wave *= angle
    sines = out.shape[1] - cosines
    np.multiply(wave[:, :sines], radius[:, :sines], out=out[:, cosines:])


def _radius(word: npt.NDArray[np.int32]) -> Float32:
    """sqrt(-2 log u) for u = (word + 1/2) / 2^31, word in [0, 2^31)."""
    u = word.astype(np.float32)
    u += np.float32(0.5)
    u *= np.float32(2.0**-31)
    mantissa = u.view(np.int32)  # u = m 2^exponent, m in [sqrt(1/2), sqrt(2)), where the series converges fast
    exponent = mantissa - _SQRT_HALF
    exponent >>= 23
    mantissa -= exponent << 23
    f = u - np.float32(1)
    u += np.float32(1)
    f /= u
    log = _horner(_LOG, np.multiply(f, f, out=u))
    log *= f
    log += exponent.astype(np.float32) * np.float32(math.log(2))
    log *= np.float32(-2)
    np.maximum(log, 0, out=log)
    return np.sqrt(log, out=log)


def _horner(coefficients: list[float], x: Float32) -> Any:
    """The polynomial with these coefficients, lowest degree first."""
    value = x * np.float32(coefficients[-1])
    for coefficient in coefficients[-2:0:-1]:
        value += np.float32(coefficient)
        value *= x
    value += np.float32(coefficients[0])
    return value
