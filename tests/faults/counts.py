"""The counts of a session of the suite, added up by the function at the end of every case."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """What the session did, over all cases."""

    killed: Counter[str] = field(default_factory=Counter)  # processes killed by SIGKILL, by executor
    stopped: Counter[str] = field(default_factory=Counter)  # by SIGTERM and SIGINT
    resumed: Counter[str] = field(default_factory=Counter)  # runs that completed what was begun
    checked: int = 0  # stores
    orphan_attempts: int = 0
    records_expected: int = 0
    records_lost: int = 0
    records_twice: int = 0

    def lines(self) -> list[str]:
        def by_executor(what: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(what.items())) or "none"

        return [
            f"moments killed      {by_executor(self.killed)}",
            f"stopped by signals  {by_executor(self.stopped)}",
            f"resumed             {by_executor(self.resumed)}",
            f"stores checked      {self.checked}; orphans of killed attempts in them {self.orphan_attempts}",
            f"records expected    {self.records_expected:,}",
            f"records lost        {self.records_lost}",
            f"records twice       {self.records_twice}",
        ]

    def as_json(self) -> str:
        return json.dumps(vars(self), indent=2) + "\n"


COUNTS = Counts()
