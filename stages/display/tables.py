"""Tables as aligned text, for terminals and files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def aligned(header: Sequence[str], rows: Sequence[Sequence[Any]], numbers: bool = False) -> str:
    """Columns under their names, two spaces apart. None is shown as a dash.

    With `numbers` all columns except the first are aligned to the right.
    """
    lines = [list(header), *(["-" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def placed(line: list[str]) -> str:
        cells = zip(range(len(widths)), line, widths)
        return "  ".join(f"{cell:{'>' if numbers and column else '<'}{width}}" for column, cell, width in cells)

    return "\n".join(placed(line).rstrip() for line in lines)
