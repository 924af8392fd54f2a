"""Counts, rates, bytes and seconds as people read them."""

from __future__ import annotations

import math
from datetime import UTC, datetime

_ENDLESS = 365e6 * 86400  # seconds


def figure(value: float, digits: int = 4) -> str:
    """A measured number to so many significant figures, with an exponent below 1/1000 and from 10^15 on: `1,235`."""
    rounded = f"{value:.{digits}g}"
    return f"{float(rounded):,.15g}" if 1e-3 <= abs(value) < 1e15 else rounded


def number_of(count: int, what: str) -> str:
    """A count and its noun, which gets an s unless there is one: `1 file`, `1,000 files`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def rate(value: float, unit: str) -> str:
    """So many a second: `1,000 images/s`, below ten with two figures."""
    return f"{value:,.0f} {unit}/s" if value >= 10 else f"{figure(value, 2)} {unit}/s"


def size(count: float, digits: int = 3) -> str:
    """Bytes in a suitable unit, to so many significant figures: `15.9 MB`. Terabytes have one figure more."""
    for unit in ("B", "kB", "MB", "GB"):
        rounded = float(f"{count:.{digits}g}")
        if rounded < 1000:  # 999.9 kB are 1 MB
            return f"{rounded:g} {unit}"
        count /= 1000
    return f"{float(f'{count:.{digits + 1}g}'):,.16g} TB"


def megabytes(count: float) -> str:
    """Bytes in megabytes, for figures that are compared: `0.5 MB`."""
    return f"{count / 1e6:,.1f} MB"


def about(seconds: float) -> str:
    """An estimated time in a suitable unit, at most years: `6.7 min`."""
    if seconds > _ENDLESS:
        return "a million years or more"
    for length, unit in ((365 * 86400, "years"), (86400, "days"), (3600, "h"), (60, "min")):
        if seconds > 1.5 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} s"


def ratio(value: float, digits: int = 2) -> str:
    """A ratio with at least so many significant figures and decimals. A tiny one has an exponent: `1.5e-04`."""
    if 0 < abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else digits
    return f"{value:,.{max(decimals, digits)}f}"


def age(seconds: float) -> str:
    """An age in whole units: `3 d`."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def clock(seconds: float | None) -> str:
    """A time to the second, short enough for a progress line: `75` -> `1m15s`."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def at_most(bad: int, looked_at: int) -> str:
    """What a sample says of the rest: if none of n is bad, at most 3/n are, by the rule of three."""
    return "see the findings" if bad else f"at most {3 / looked_at:.2%} with 95 % confidence"


def duration(seconds: float) -> str:
    """A time to the second, written out: `1 min 15 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def stamp() -> str:
    """The time now in a name of a file (UTC, to the microsecond), in the order of time: `20260101T000000.000000Z`."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
