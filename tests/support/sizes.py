"""How much of what could go on for ever: enough for every run of the tests, and all of it for `make test-all`."""

from __future__ import annotations

import os
from typing import TypeVar

FULL = os.environ.get("NFM_FULL") == "1"
Size = TypeVar("Size", int, float)


def sized(quick: Size, full: Size) -> Size:
    """`full` under NFM_FULL=1, else `quick`."""
    return full if FULL else quick
