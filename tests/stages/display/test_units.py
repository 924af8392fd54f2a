"""Bytes and seconds as people read them, the same everywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nfm.stages.display.units import about, age, clock, duration, megabytes, ratio, size


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (size, 0, "0 B"),
        (size, 999, "999 B"),
        (size, 1234, "1.23 kB"),
        (size, 999_700, "1 MB"),  # never 1e+03 kB
        (size, 15_900_000, "15.9 MB"),
        (size, 630e9, "630 GB"),
        (size, 6.149e12, "6.149 TB"),
        (size, 1.2e18, "1,200,000 TB"),
        (megabytes, 1_234_560_000, "1,234.6 MB"),
        (about, 44.4, "44 s"),
        (about, 400, "6.7 min"),
        (about, 5220, "87.0 min"),
        (about, 10 * 365 * 86400, "10.0 years"),
        (about, 1e300, "a million years or more"),
        (age, 59, "59 s"),
        (age, 3 * 86400, "3 d"),
        (clock, None, "?"),
        (clock, 75.9, "1m15s"),
        (clock, 7260, "2h01m"),
        (duration, 59.96, "1 min 00 s"),
    ],
)
def test_a_value_has_the_unit_that_suits(show: Callable[[float | None], str], value: float | None, text: str) -> None:
    assert show(value) == text


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0.00"), (1.5e-4, "1.5e-04"), (0.0042, "0.0042"), (0.447, "0.45"), (1.03, "1.03")]
)
def test_a_ratio_has_two_significant_digits(value: float, shown: str) -> None:
    assert ratio(value) == shown
