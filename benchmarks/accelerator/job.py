"""What a piece is given, and how it says that it is not at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accelerator.sizes import Plan


class Unfinished(Exception):  # noqa: N818 - no error: the work is kept, and the next call goes on
    """The time of a piece is over before its work; what was done lies in its folder."""


@dataclass(frozen=True)
class Job:
    """`folder` keeps the work, `until` is when to stop by time.monotonic, `known` has the results of other pieces."""

    plan: Plan
    device: str
    folder: Path
    until: float
    known: Mapping[str, Any]
    images: Path | None = None  # an .npz of the trial's images

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until
