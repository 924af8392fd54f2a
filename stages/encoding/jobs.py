"""The interface of executors: each runs the same `Encoder.encode_shard` and yields one outcome for each shard.

An executor is a function `run(setup, jobs, workers, halt) -> Iterator[Outcome | None]`. It yields None if nothing has
finished for about a second, so that the caller can do something else. A shard that fails `TRIES` times is yielded with
its traceback, and the rest continues. If `halt.stopping` becomes true, the executor ends early: committed shards stay,
unfinished ones are dropped. If `halt.ending` becomes true, started shards are finished and no other is started.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Protocol

from nfm.storage.format.spec import shard_name
from nfm.storage.ledger.commits import Commit

TRIES = 3


class Halt(Protocol):
    """What an executor asks between shards. The reporter of a stage has these properties."""

    @property
    def stopping(self) -> bool:
        """Whether to drop the started shards."""
        ...

    @property
    def ending(self) -> bool:
        """Whether to finish the started shards and start no other; also true if `stopping` is."""
        ...


@dataclass(frozen=True)
class ShardJob:
    """One shard to encode. `attempt` makes the names of its files unique.

    `tries` counts its own failures, `deaths` the deaths of processes that worked on it.
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
        """The same shard as a new attempt."""
        return replace(self, attempt=new_attempt(), tries=self.tries + failed, deaths=self.deaths + died)


@dataclass(frozen=True)
class Timing:
    """Seconds of one shard from start to commit, and the seconds that reading, encoding and writing worked.

    The three overlap, so their sum may exceed `wall`.
    """

    wall: float = 0.0
    read: float = 0.0
    encode: float = 0.0
    write: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """The valid commit of the shard, or the traceback of its last failure; by which worker, and when."""

    job: ShardJob
    commit: Commit | None = None
    error: str | None = None
    worker: str = ""
    timing: Timing | None = None


def new_attempt() -> str:
    return secrets.token_hex(4)
