"""How long a test waits before something counts as hung. A slow, busy machine must not fail a test."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

PATIENCE = 600.0  # seconds, of everything that should happen and is waited for


def until(condition: Callable[[], object], what: str = "waited in vain") -> None:
    """Returns once `condition()` is true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def allowed(seconds: float) -> float:
    """What is promised within `seconds` on free cores may take ten times as long where others use them."""
    return seconds if os.getloadavg()[0] < (os.cpu_count() or 1) else 10 * seconds
