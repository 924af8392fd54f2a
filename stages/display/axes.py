"""What the axes of plots have in common: limits that include the data, and enough labels to read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

BINS = 120
_STEPS: tuple[tuple[int, ...], ...] = ((1,), (1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9))
FEWEST, MOST = 3, 8  # labels of a logarithmic axis


def compact(value: float, _: Any = None) -> str:
    """A short number: 1,500 as 1.5k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers within 0 < low < high, at least three: 1, 10, 100; or 1, 2, 5; or finer ones if needed."""
    for steps in _STEPS:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) >= FEWEST:
            return ticks[:: -(-len(ticks) // MOST)]
    size = 10.0 ** math.floor(math.log10(high - low))
    for step in (size * part for part in (1, 0.5, 0.2, 0.1)):
        ticks = [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
        if len(ticks) >= FEWEST:
            break
    return ticks[:: -(-len(ticks) // MOST)]


def make_log(axis: Any, values: Iterable[float], aside: float = 0.0) -> None:
    """Makes an axis logarithmic, wide enough for these values, with plain numbers as labels.

    `aside` is the share of the axis that stays free at its upper end, for text beside the points.
    """
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    axes, letter = axis.axes, axis.axis_name
    found = [value for value in values if math.isfinite(value) and value > 0]
    low, high = (min(found), max(found)) if found else (1.0, 10.0)
    room = max((high / low) ** 0.06, 1.02)
    low, high = low / room, high * room * (high / low) ** aside
    getattr(axes, f"set_{letter}scale")("log")
    getattr(axes, f"set_{letter}lim")(low, high)
    axis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.set_major_formatter(_plain)
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float, _: Any = None) -> str:
    return compact(float(f"{value:.6g}"))


def robust_limits(series: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Limits without the peak of the first steps, which would make the rest of the curve look flat."""
    tails = np.concatenate([np.asarray(values, float)[len(values) // 20 :] for values in series])
    tails = tails[np.isfinite(tails)]
    if not len(tails):
        return 0.0, 1.0
    low, high = float(tails.min()), float(tails.max())
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 0.5
    return low - margin, high + margin


def marked(points: int) -> dict[str, Any]:
    """Style for a line with so few points that it needs marks to be seen."""
    return {"marker": "o", "ms": 4} if points <= 3 else {}


def noise_edges(*values: np.ndarray) -> np.ndarray:
    """Edges of a histogram around 0 that includes all finite values, at least from -5 to 5."""
    furthest = max((float(np.abs(found[np.isfinite(found)]).max(initial=0)) for found in values), default=0.0)
    end = max(math.ceil(furthest * 1.001), 5)
    return np.linspace(-end, end, BINS + 1)


def density(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The density of a histogram. It is divided by the number of all values, also those outside."""
    return np.histogram(values, edges)[0] / (max(values.size, 1) * np.diff(edges))


def density_span(values: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    """The range of a logarithmic axis: from below the density of one value to the highest bar, or 1."""
    lowest = 0.3 / (max(values.size, 1) * float(edges[1] - edges[0]))
    return min(lowest, 0.1), max(float(density(values, edges).max()), 1.0)


def normal(at: np.ndarray) -> np.ndarray:
    """The density of N(0, 1)."""
    return np.exp(-(at**2) / 2) / np.sqrt(2 * np.pi)


def mark_solvers(axes: Any, taken: Mapping[str, Iterable[int]], ink: str) -> None:
    """Draws a line between the NFE where Euler ends and where another solver begins, with both names beside it.

    `axes` are logarithmic along NFE. Nothing is drawn if the NFE of the solvers overlap.
    """
    spans = sorted((min(found), max(found), name) for name, nfe in taken.items() if (found := list(nfe)))
    for (_, end, before), (begin, _, after) in pairwise(spans):
        if end >= begin:
            continue
        middle = math.sqrt(end * begin)
        axes.axvline(middle, color=ink, lw=0.8, ls=(0, (2, 3)))
        for text, side, shift in ((before.capitalize(), "right", -4), (after.capitalize(), "left", 4)):
            place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "bottom", "ha": side}
            axes.annotate(text, (middle, 1), xytext=(shift, 2), fontsize=8, color=ink, **place)
