"""What executors run: units of work of any kind, each a job that becomes one commit, wherever it is done.

A kind of work is a class of `Work`, which names the function that makes its units. An executor is a function
`run(work, jobs, workers, halt) -> Iterator[Outcome | None]`. It yields one outcome for each job, and None if nothing
has finished for about a second, so that the caller can do something else. A job that fails `TRIES` times is yielded
with its traceback, and the rest continues. If `halt.stopping` becomes true, the executor ends early: committed jobs
stay, unfinished ones are dropped. If `halt.ending` becomes true, started jobs are finished and no other is started.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self

from nfm.stages.base import call

TRIES = 3
_OUR_CLASS = re.compile(r"^nfm\.[\w.]+: ")


class Halt(Protocol):
    """What an executor asks between jobs. The reporter of a stage has these properties."""

    @property
    def stopping(self) -> bool:
        """Whether to drop the started jobs."""
        ...

    @property
    def ending(self) -> bool:
        """Whether to finish the started jobs and start no other; also true if `stopping` is."""
        ...


@dataclass(frozen=True)
class Job:
    """One unit of work. `attempt` makes the names of its files unique; `name` is that of its commit.

    `tries` counts its own failures, `deaths` the deaths of processes that worked on it.
    """

    name: str
    attempt: str
    tries: int = 0
    deaths: int = 0

    def again(self, failed: bool = False, died: bool = False) -> Self:
        """The same work as a new attempt."""
        return replace(self, attempt=new_attempt(), tries=self.tries + failed, deaths=self.deaths + died)


@dataclass(frozen=True)
class Timing:
    """Seconds of one job from start to commit, and the seconds that reading, encoding and writing worked.

    The three overlap, so their sum may exceed `wall`.
    """

    wall: float = 0.0
    read: float = 0.0
    encode: float = 0.0
    write: float = 0.0


class Made(Protocol):
    """What executors and those who count ask of a commit."""

    @property
    def name(self) -> str: ...
    @property
    def records(self) -> int: ...
    @property
    def seconds(self) -> float: ...


Unit = Callable[[Any, Callable[[], bool]], tuple[Any, Timing]]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker needs to begin. It is sent to wherever the work is done, so it holds paths and plain values.

    `unit` names a function (`module:function`) that is called with this work, once in each worker: it loads what all
    jobs need and returns the unit of work, a function `(job, stopping) -> (commit, timing)`. That returns the valid
    commit, which may be an earlier one, and raises InterruptedError if `stopping()` becomes true before it is
    published. `section` is the config's section in messages, `memory` what to lower where memory is short. `store` is
    the folder, or the URL, in which commits stand. `device` is where to compute: "auto" is chosen where the worker
    runs. `threads` are those of each worker; with `torch`, also torch's.
    """

    unit: ClassVar[str]
    section: ClassVar[str]
    memory: ClassVar[str]
    torch: ClassVar[bool] = True
    store: str
    threads: int
    device: str

    def begin(self) -> Unit:
        """The unit of work, in this process."""
        unit: Unit = call(self.unit, self)
        return unit


@dataclass(frozen=True)
class Outcome:
    """The valid commit of the job, or the traceback of its last failure; by which worker, and when."""

    job: Job
    commit: Any = None
    error: str | None = None
    worker: str = ""
    timing: Timing | None = None


def new_attempt() -> str:
    return secrets.token_hex(4)


def jobs_of(names: Iterable[str]) -> Iterator[Job]:
    """A new attempt for each."""
    return (Job(name, new_attempt()) for name in names)


def last_line(traceback: str) -> str:
    """The last line of a failed job's traceback; for our own errors, only their message."""
    return _OUR_CLASS.sub("", (traceback.strip().splitlines() or ["no message"])[-1])
