"""Moments of the noise, accumulated over batches and pooled over shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from nfm.storage.errors import StorageError
from nfm.storage.format import untrusted

Moments = dict[str, float | int | None]
# The largest possible moments of float32 values. Larger ones could not be pooled in float64.
_MOST = {"mean": 3.5e38, "min": 3.5e38, "max": 3.5e38, "var": 1.3e77, "skewness": 1e18, "kurtosis": 1e18}
_CACHED = 8192  # values at a time: few enough for the cache and for BLAS to stay on one thread
_COUNTED = 1 << 16  # from this size on, numbers of 16 bits or less are counted by value, in half the time
_PIECE = 1 << 18  # values counted at a time


class MomentSums:
    """Running power sums in float64. As the noise has mean near 0 and variance near 1, raw sums lose no precision."""

    def __init__(self) -> None:
        self.count = 0
        self.nonfinite = 0
        self._sums = np.zeros(4)
        self._min = np.inf
        self._max = -np.inf

    def add(self, values: np.ndarray[Any, Any], step: float | None = None) -> None:
        """Adds all values of an array of any shape.

        Integers are multiplied by `step`. Values that are not finite are only counted.
        """
        flat = np.asarray(values).reshape(-1)
        scale = 1.0 if step is None else step
        if flat.size >= _COUNTED and flat.dtype in (np.float16, np.int16, np.int8):
            self._add_counted(flat, scale)
            return
        for start in range(0, flat.size, _CACHED):
            part = flat[start : start + _CACHED].astype(np.float64)
            self._add(part if step is None else part * scale)

    def _add_counted(self, flat: np.ndarray[Any, Any], scale: float) -> None:
        bits = flat.view(f"u{flat.itemsize}")
        counts = np.zeros(1 << (8 * flat.itemsize), np.int64)
        for start in range(0, bits.size, _PIECE):
            counts += np.bincount(bits[start : start + _PIECE], minlength=counts.size)
        seen = np.flatnonzero(counts)
        values, counts = seen.astype(bits.dtype).view(flat.dtype).astype(np.float64) * scale, counts[seen]
        finite = np.isfinite(values)
        self.nonfinite += int(counts[~finite].sum())
        self._take(values[finite], counts[finite])

    def _add(self, part: np.ndarray[Any, Any]) -> None:
        finite = np.isfinite(part)
        if not finite.all():
            self.nonfinite += int(part.size - finite.sum())
            part = part[finite]
        self._take(part, None)

    def _take(self, part: np.ndarray[Any, Any], counts: np.ndarray[Any, Any] | None) -> None:
        if not part.size:
            return
        square, weighted = part * part, part if counts is None else part * counts
        self._sums += (weighted.sum(), weighted @ part, weighted @ square, (weighted * part) @ square)
        self.count += part.size if counts is None else int(counts.sum())
        self._min = min(self._min, float(part.min()))
        self._max = max(self._max, float(part.max()))

    def result(self) -> Moments:
        """The moments, see `from_raw`. Everything is None if there was no finite value."""
        if not self.count:
            return dict.fromkeys(("mean", "var", "min", "max", "skewness", "kurtosis"), None) | {
                "nonfinite": self.nonfinite
            }
        return from_raw(self._sums / self.count, self._min, self._max, self.nonfinite)


def from_raw(raw: np.ndarray[Any, Any], low: float, high: float, nonfinite: int) -> Moments:
    """Central moments from E[z], E[z^2], E[z^3], E[z^4].

    `var` divides by n. `kurtosis` is E[(z - mean)^4] / var^2, which is 3 for a Gaussian, and None if var is 0.
    """
    m1, m2, m3, m4 = (float(value) for value in raw)
    var = max(m2 - m1 * m1, 0.0)
    third = m3 - 3 * m1 * m2 + 2 * m1**3
    fourth = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4
    return {
        "mean": m1,
        "var": var,
        "min": float(low),
        "max": float(high),
        "skewness": third / var**1.5 if var > 0 else None,
        "kurtosis": fourth / var**2 if var > 0 else None,
        "nonfinite": int(nonfinite),
    }


def check_moments(where: str, moments: Any) -> None:
    """Raises StorageError unless these are valid moments, as read from a file."""
    for name, value in untrusted.mapping(where, moments).items():
        if value is not None and abs(untrusted.real(f"{where} {name}", value)) > _MOST.get(name, math.inf):
            raise StorageError(f"{where}: {name} is {value}, which no float32 values have")
    if not {"mean", "var", "kurtosis", "min", "max", "nonfinite"} <= set(moments):
        raise StorageError(f"{where}: incomplete; was it written by this package?")
    untrusted.integer(f"{where} nonfinite", moments["nonfinite"])
    if len({moments[name] is None for name in ("mean", "var", "min", "max")}) > 1 or (moments["var"] or 0.0) < 0:
        raise StorageError(f"{where}: some are missing, or the variance is negative")


def pool(parts: Iterable[tuple[int, Mapping[str, Any]]]) -> Moments:
    """The moments of a union, from (number of values, moments) of each part."""
    total, nonfinite, raw = 0, 0, np.zeros(4)
    low, high = np.inf, -np.inf
    for count, part in parts:
        nonfinite += int(part["nonfinite"])
        if part["mean"] is None:
            continue
        mean, var = float(part["mean"]), float(part["var"])
        third = float(part.get("skewness") or 0.0) * var**1.5
        fourth = float(part["kurtosis"] or 0.0) * var**2
        raw += count * np.array(
            (
                mean,
                var + mean**2,
                third + 3 * mean * var + mean**3,
                fourth + 4 * mean * third + 6 * mean**2 * var + mean**4,
            )
        )
        total += count
        low, high = min(low, float(part["min"])), max(high, float(part["max"]))
    if not total:
        return MomentSums().result() | {"nonfinite": nonfinite}
    return from_raw(raw / total, low, high, nonfinite)
