"""Moments of the noise, accumulated over batches and pooled over shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Moments = dict[str, float | int | None]
_CACHED = 8192  # values at a time: they stay in cache, and products stay below BLAS's threads


class MomentSums:
    """Running power sums in float64; the noise is near mean 0 and variance 1, so raw sums lose nothing."""

    def __init__(self) -> None:
        self.count = 0
        self.nonfinite = 0
        self._sums = np.zeros(4)
        self._min = np.inf
        self._max = -np.inf

    def add(self, values: np.ndarray[Any, Any]) -> None:
        """Adds all values of an array of any shape; non-finite ones are counted and left out."""
        flat = np.asarray(values).reshape(-1)
        for start in range(0, flat.size, _CACHED):
            self._add(flat[start : start + _CACHED].astype(np.float64))

    def _add(self, part: np.ndarray[Any, Any]) -> None:
        finite = np.isfinite(part)
        if not finite.all():
            self.nonfinite += int(part.size - finite.sum())
            part = part[finite]
        if not part.size:
            return
        square = part * part
        self._sums += (part.sum(), part @ part, square @ part, square @ square)
        self.count += part.size
        self._min = min(self._min, float(part.min()))
        self._max = max(self._max, float(part.max()))

    def result(self) -> Moments:
        """See `from_raw`; everything is None when there was no finite value."""
        if not self.count:
            return dict.fromkeys(("mean", "var", "min", "max", "skewness", "kurtosis"), None) | {
                "nonfinite": self.nonfinite
            }
        return from_raw(self._sums / self.count, self._min, self._max, self.nonfinite)


def from_raw(raw: np.ndarray[Any, Any], low: float, high: float, nonfinite: int) -> Moments:
    """Central moments from E[z], E[z^2], E[z^3], E[z^4].

    `var` divides by n; `kurtosis` is E[(z - mean)^4] / var^2, 3 for a Gaussian; None where var is 0.
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
