"""A few lines at the bottom of a terminal that are redrawn in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from nfm.stages.display.tables import aligned

PARTS = ("read", "encode", "write", "wait")
_ERASE_LINE, _ERASE_BELOW = "\x1b[K", "\x1b[J"


class Live:
    """Lines on a terminal. Between calls the cursor is at the start of the line below them."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._drawn: list[str] = []

    def size(self) -> tuple[int, int]:
        """(columns, lines) of the terminal now; a usual size if it is unknown."""
        try:
            found = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            return 80, 24
        return (found.columns, found.lines) if found.columns > 0 and found.lines > 0 else (80, 24)

    def draw(self, lines: Sequence[str]) -> None:
        """Replaces the lines drawn before by these, cut to the size of the terminal."""
        columns, rows = self.size()
        new = [line[: columns - 1] for line in lines[: max(rows - 1, 1)]]
        self._write(self._back() + "".join(f"{line}{_ERASE_LINE}\n" for line in new) + _ERASE_BELOW)
        self._drawn = new

    def clear(self) -> None:
        """Removes the lines."""
        if self._drawn:
            self._write(self._back() + _ERASE_BELOW)
            self._drawn = []

    def forget(self) -> None:
        """Leaves the drawn lines as they are, after other output below them."""
        self._drawn = []

    def _back(self) -> str:
        """Moves to the first drawn line. If the terminal became narrower, the lines have wrapped."""
        columns = self.size()[0]
        rows = sum(max(1, -(-len(line) // columns)) for line in self._drawn)
        return f"\r\x1b[{rows}A" if rows else "\r"

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def worker_lines(workers: Sequence[Mapping[str, Any]], unit: str, most: int) -> list[str]:
    """A table of workers, one line each, at most `most` lines in all. The last one says how many are left out."""
    if not workers or most < 2:
        return []
    shown = list(workers) if len(workers) <= most - 1 else list(workers)[: most - 2]
    header = ["worker", f"{unit}/s", *PARTS, "shards"]
    rows = [
        [row["worker"], f"{row['per_second']:,.1f}", *(percent(row[part]) for part in PARTS), row["shards"]]
        for row in shown
    ]
    left_out = len(workers) - len(shown)
    return aligned(header, rows, numbers=True).splitlines() + ([f"and {left_out} more"] if left_out else [])


def percent(share: float) -> str:
    """`0.256` -> `26 %`."""
    return f"{share:.0%}".replace("%", " %")
