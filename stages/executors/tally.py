"""How each worker has used its time so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nfm.stages.executors.jobs import Outcome, Timing

# a worker is gone after the longer of two times: these seconds, or the time of so many shards
GONE_SECONDS, GONE_SHARDS = 120.0, 4


@dataclass
class _Worked:
    since: float
    last: float = 0.0
    shards: int = 0
    records: int = 0
    spent: Timing = field(default_factory=Timing)


class Tally:
    """Adds up outcomes. `rows` has one row for each worker: shards, its rate, and shares of the time since it started.

    `read`, `encode` and `write` overlap. `wait` is the share of time without a shard.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._workers: dict[str, _Worked] = {}

    def add(self, outcome: Outcome) -> None:
        if outcome.commit is None or outcome.timing is None:
            return
        new, now = outcome.timing, self._clock()
        worked = self._workers.setdefault(outcome.worker, _Worked(now - new.wall))
        worked.shards, worked.last = worked.shards + 1, now
        worked.records += outcome.commit.records
        old = worked.spent
        worked.spent = Timing(old.wall + new.wall, old.read + new.read, old.encode + new.encode, old.write + new.write)

    def rows(self) -> list[dict[str, Any]]:
        """For `Reporter.progress`: the current rates and shares of the workers that are still there."""
        return [self._row(name, worked) for name, worked in sorted(self._workers.items()) if not self._left(worked)]

    def _left(self, worked: _Worked) -> bool:
        """Whether a worker has sent nothing for so long that it must be gone."""
        return self._clock() - worked.last > max(GONE_SECONDS, GONE_SHARDS * worked.spent.wall / worked.shards)

    def _row(self, name: str, worked: _Worked) -> dict[str, Any]:
        elapsed, spent = max(self._clock() - worked.since, 1e-9), worked.spent
        shares = {"read": spent.read, "encode": spent.encode, "write": spent.write}
        return {
            "worker": name,
            "shards": worked.shards,
            "per_second": round(worked.records / elapsed, 2),
            **{part: round(seconds / elapsed, 3) for part, seconds in shares.items()},
            "wait": round(max(0.0, 1 - spent.wall / elapsed), 3),
        }
