"""Where shards are encoded: every executor runs the same `Encoder.encode_shard` and yields an outcome a shard.

An executor is a function `run(setup, jobs, workers, stopping) -> Iterator[Outcome]`. A shard that fails by itself
`TRIES` times is yielded with its traceback and the rest goes on. When `stopping()` turns true the executor ends
early: what is committed stays, what is in flight is dropped.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from nfm.storage.commits import Commit

TRIES = 3
Stopping = Callable[[], bool]


@dataclass(frozen=True)
class ShardJob:
    """One shard to encode: `attempt` makes its files' names unique, `tries` counts its own failures."""

    draw: int
    shard: int
    attempt: str
    tries: int = 0

    def again(self, failed: bool) -> ShardJob:
        """The same shard under a new attempt."""
        return replace(self, attempt=new_attempt(), tries=self.tries + failed)


@dataclass(frozen=True)
class Outcome:
    """The commit that now stands for the shard, or the traceback of its last failure."""

    job: ShardJob
    commit: Commit | None = None
    error: str | None = None


def new_attempt() -> str:
    return secrets.token_hex(4)
