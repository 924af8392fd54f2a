"""The sizes of tests that could run for ever: small in every run, full size with `make test-all`."""

from __future__ import annotations

import os
from typing import TypeVar

FULL = os.environ.get("NFM_FULL") == "1"
Size = TypeVar("Size", int, float)


def sized(quick: Size, full: Size) -> Size:
    """`full` under NFM_FULL=1, else `quick`."""
    return full if FULL else quick
