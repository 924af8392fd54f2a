"""Random numbers of a record: functions of (seed, draw, slot) only. The worker, the batch and the order do not matter.

Bits are Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), from numpy. The key is
(seed, purpose). The 256-bit counter starts at (0, slot, draw, 0), and its first word counts blocks from 1. Normals are
Box-Muller (1958) in float64, rounded to float32. Logarithm, sine and cosine are series made of additions, products and
square roots, which IEEE 754 rounds the same on every machine. Library functions differ in the last bit between
processors, and `nfm audit --deep` compares bytes.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

_WORD = 2**64
_CHUNK_WORDS = 32768  # float64 temporaries of a chunk fit into a core's cache
# log m = 2 f (1 + s/3 + s^2/5 + ...) with f = (m - 1) / (m + 1), s = f^2 <= 0.0295
_LOG = [2.0 / (2 * k + 1) for k in range(10)]
# Taylor series on [-pi/2, pi/2]; the first term left out is below 3e-16
_SIN = [(-1.0) ** k / math.factorial(2 * k + 1) for k in range(10)]
_COS = [(-1.0) ** k / math.factorial(2 * k) for k in range(11)]


def words(seed: int, draw: int, slots: npt.NDArray[np.int64], count: int, purpose: str) -> npt.NDArray[np.uint64]:
    """The first `count` 64-bit words of each record's stream: uint64 [n, count]."""
    if not 0 <= draw < _WORD:
        raise ValueError(f"draw {draw} is outside 0..2^64-1")
    if len(slots) and int(np.min(slots)) < 0:
        raise ValueError(f"slot {int(np.min(slots))} is negative")
    counters = np.zeros((len(slots), 4), np.uint64)
    counters[:, 1], counters[:, 2] = slots, draw
    return raw(seed, purpose, counters, count)


def raw(seed: int, purpose: str, counters: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.uint64]:
    """The `count` words after each counter: uint64 [n, count].

    Counters are [n, 4]; their first word is 0 and counts blocks.
    """
    if not 0 <= seed < _WORD:
        raise ValueError(f"seed {seed} is outside 0..2^64-1")
    generator = np.random.Philox(key=seed | _purpose(purpose) << 64)
    state = generator.state
    counter = state["state"]["counter"]
    out = np.empty((len(counters), count), np.uint64)
    for row, start in enumerate(counters):
        counter[:] = start
        generator.state = state  # ten times faster than a new generator for each record
        out[row] = generator.random_raw(count)
    return out


def _purpose(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def normals(
    seed: int, draw: int, slots: npt.NDArray[np.int64], size: int, purpose: str = "eps"
) -> npt.NDArray[np.float32]:
    """Standard normals, float32 [n, size]. Row i depends only on (seed, draw, slots[i], purpose)."""
    pairs = -(-size // 2)
    out = np.empty((len(slots), size), np.float32)
    rows = max(1, _CHUNK_WORDS // max(1, 2 * pairs))
    for start in range(0, len(slots), rows):
        bits = words(seed, draw, slots[start : start + rows], 2 * pairs, purpose)
        out[start : start + rows] = box_muller(bits)[:, :size]
    return out


def flips(seed: int, draw: int, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """A fair coin for each record, bool [n]: whether its image is flipped before it is encoded."""
    return (words(seed, draw, slots, 1, "flip")[:, 0] >> np.uint64(63)).astype(np.bool_)


def box_muller(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Normals float64 [n, 2k] from uint64 [n, 2k]: word 2j gives the radius, word 2j+1 the angle of a pair.

    The angle is uniform on [-pi/2, pi/2]. The top bit of its word changes the sign of the cosine, which covers the
    circle.
    """
    radius = _sqrt_minus_two_log(((bits[:, 0::2] >> np.uint64(11)) + np.uint64(1)) * 2.0**-53)
    word = bits[:, 1::2]
    angle = ((word & np.uint64(2**53 - 1)).astype(np.float64) + 0.5) * 2.0**-53 - 0.5
    angle *= math.pi
    square = angle * angle
    out = np.empty(bits.shape, np.float64)
    mirror = 1.0 - 2.0 * (word >> np.uint64(63)).astype(np.float64)
    np.multiply(_horner(_COS, square) * mirror, radius, out=out[:, 0::2])
    np.multiply(_horner(_SIN, square) * angle, radius, out=out[:, 1::2])
    return out


def _sqrt_minus_two_log(uniform: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """sqrt(-2 log u) for u in (0, 1]."""
    mantissa, exponent = np.frexp(uniform)
    small = mantissa < math.sqrt(0.5)
    mantissa += mantissa * small  # now in [sqrt(1/2), sqrt(2)), where the series converges fast
    exponent -= small
    f = (mantissa - 1.0) / (mantissa + 1.0)
    log = _horner(_LOG, f * f) * f
    log += exponent * math.log(2.0)
    log *= -2.0
    return np.sqrt(log, out=log)


def _horner(coefficients: list[float], x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The polynomial with these coefficients, lowest degree first."""
    value = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        value += coefficient
        value *= x
    value += coefficients[0]
    return value
