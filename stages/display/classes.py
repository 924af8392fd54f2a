"""Arranges the images of a grid by class: rows of one class each, or classes in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

COLUMNS, WIDEST = 8, 16  # images in a row; in a row of one class


class GridRow(NamedTuple):
    title: str
    images: list[int]  # their numbers, from 0


def rows_of(
    labels: Sequence[int] | np.ndarray | None, count: int, columns: int = COLUMNS, names: Sequence[str] = ()
) -> list[GridRow]:
    """The rows of a grid of `count` images: one class in each row if most classes have several, else classes in order.

    Without labels, or with -1 for all, the images keep their order and the rows have no titles. Titles have the `names`
    of the classes, or their numbers.
    """
    classes = np.full(count, -1) if labels is None else np.asarray(labels)[:count]
    order = np.argsort(classes, kind="stable")
    found = np.unique(classes)
    if len(found) == 1 and found[0] < 0:
        return [GridRow("", part) for part in _parts(list(range(count)), columns)]
    if count >= 2 * len(found):
        groups = [(_title(label, label, names), order[classes[order] == label].tolist()) for label in found.tolist()]
        return [GridRow(title, part) for title, group in groups for part in _parts(group, WIDEST)]
    parts = _parts(order.tolist(), columns)
    return [GridRow(_title(int(classes[part[0]]), int(classes[part[-1]]), names), part) for part in parts]


def _title(first: int, last: int, names: Sequence[str]) -> str:
    start, end = (names[label] if 0 <= label < len(names) else label for label in (first, last))
    if first == last:
        return "no class" if first < 0 else f"class {start}"
    return f"class {start} to {end}" if first >= 0 else f"to class {end}"


def _parts(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
