"""Where shards are encoded: every executor runs the same `Encoder.encode_shard` and yields an outcome a shard.

An executor is a function `run(setup, jobs, workers, halt) -> Iterator[Outcome | None]`; None is a tick: nothing ended
for about a second, and the caller may look around. A shard that fails by itself `TRIES` times is yielded with its
traceback and the rest goes on. When `halt.stopping` turns true the executor ends early: what is committed stays, what
is in flight is dropped; when `halt.ending` does, shards in hand are finished and no other is begun.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Protocol

from nfm.storage.format.spec import shard_name
from nfm.storage.ledger.commits import Commit

TRIES = 3


class Halt(Protocol):
    """What an executor asks between units of work; a stage's reporter is one."""

    @property
    def stopping(self) -> bool:
        """Drop the shards in hand."""
        ...

    @property
    def ending(self) -> bool:
        """Finish the shards in hand, begin no other; true as well when `stopping` is."""
        ...


@dataclass(frozen=True)
class ShardJob:
    """One shard to encode: `attempt` makes its files' names unique.

    `tries` counts its own failures, `deaths` how often the process that worked on it died.
    """

    draw: int
    shard: int
    attempt: str
    tries: int = 0
    deaths: int = 0

    @property
    def name(self) -> str:
        return shard_name(self.draw, self.shard)

    def again(self, failed: bool = False, died: bool = False) -> ShardJob:
        """The same shard under a new attempt."""
        return replace(self, attempt=new_attempt(), tries=self.tries + failed, deaths=self.deaths + died)


@dataclass(frozen=True)
class Timing:
    """Seconds of one shard from its beginning to its commit, and how long its reading, encoding and writing worked.

    The three overlap, so their sum may exceed `wall`.
    """

    wall: float = 0.0
    read: float = 0.0
    encode: float = 0.0
    write: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """The commit that now stands for the shard, or the traceback of its last failure; by which worker, and when."""

    job: ShardJob
    commit: Commit | None = None
    error: str | None = None
    worker: str = ""
    timing: Timing | None = None


def new_attempt() -> str:
    return secrets.token_hex(4)
