"""A few lines at the bottom of a terminal that are drawn again in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from nfm.stages.display.tables import aligned

PARTS = ("read", "encode", "write", "wait")
_ERASE_LINE, _ERASE_BELOW = "\x1b[K", "\x1b[J"


class Live:
    """Lines on a terminal. Between calls the cursor stands at the start of the line below them."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._drawn: list[str] = []

    def size(self) -> tuple[int, int]:
        """(columns, lines) of the terminal now; of a usual one where it cannot be asked."""
        try:
            found = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            return 80, 24
        return (found.columns, found.lines) if found.columns > 0 and found.lines > 0 else (80, 24)

    def draw(self, lines: Sequence[str]) -> None:
        """Show these lines in place of those drawn before, cut to what the terminal holds."""
        columns, rows = self.size()
        new = [line[: columns - 1] for line in lines[: max(rows - 1, 1)]]
        self._write(self._back() + "".join(f"{line}{_ERASE_LINE}\n" for line in new) + _ERASE_BELOW)
        self._drawn = new

    def clear(self) -> None:
        """Take the lines away."""
        if self._drawn:
            self._write(self._back() + _ERASE_BELOW)
            self._drawn = []

    def forget(self) -> None:
        """Leave what was drawn as it is: somebody else has written below it."""
        self._drawn = []

    def _back(self) -> str:
        """To the first drawn line. A terminal that was made narrower has wrapped them since."""
        columns = self.size()[0]
        rows = sum(max(1, -(-len(line) // columns)) for line in self._drawn)
        return f"\r\x1b[{rows}A" if rows else "\r"

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def worker_lines(workers: Sequence[Mapping[str, Any]], most: int) -> list[str]:
    """A table with a line a worker, at most `most` lines in all, the last of them saying how many are left out."""
    if not workers or most < 2:
        return []
    shown = list(workers) if len(workers) <= most - 1 else list(workers)[: most - 2]
    header = ["worker", "pairs/s", *PARTS, "shards"]
    rows = [
        [row["worker"], f"{row['pairs_per_second']:,.1f}", *(percent(row[part]) for part in PARTS), row["shards"]]
        for row in shown
    ]
    left_out = len(workers) - len(shown)
    return aligned(header, rows, numbers=True).splitlines() + ([f"and {left_out} more"] if left_out else [])


def percent(share: float) -> str:
    """`0.256` -> `26 %`."""
    return f"{share:.0%}".replace("%", " %")
