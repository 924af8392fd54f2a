"""The output of a run: a live table on a terminal, plain lines elsewhere, and the same figures in `events/`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from nfm.pipeline.artifacts.lock import Lock
from nfm.pipeline.console.copies import EventCopy
from nfm.pipeline.console.live import PARTS, Live, percent, worker_lines
from nfm.pipeline.console.progress import last_progress
from nfm.pipeline.console.rate import Rate
from nfm.stages.display import units
from nfm.storage.errors import legible
from nfm.storage.errors.masked import masked, masked_in
from nfm.storage.files.paths import inside

__all__ = ["Console", "StopRequest", "last_progress"]
FIRST_SECONDS = 5.0  # of a stage's first count; its rate is not reliable earlier
PLAIN_SECONDS = 30.0
LOGGED_WORKERS = 64  # rows in an event; the shares are medians over all workers
EVENT_SECONDS = 30.0
DRAW_SECONDS = 0.25

Workers = Sequence[Mapping[str, Any]]


class StopRequest:
    """Set by signals. Stages check it between units of work.

    SIGINT and SIGTERM drop the current work at the next good place. SIGUSR1 finishes it and starts nothing new. Inside
    `at_once`, where there is nothing to save, the first two stop anywhere.
    """

    def __init__(self) -> None:
        self.asked = False
        self.asked_to_end = False
        self.messages = 0  # messages written so far, outside of the live table
        self._at_once = False

    @property
    def ending(self) -> bool:
        """Whether nothing new may begin."""
        return self.asked or self.asked_to_end

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handles the signals during a run. A second SIGINT or SIGTERM stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._end)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that leaves nothing to save: the first SIGINT or SIGTERM raises KeyboardInterrupt immediately."""
        before, self._at_once = self._at_once, True
        try:
            yield
        finally:
            self._at_once = before

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self._at_once:
            raise KeyboardInterrupt
        self._tell("stopping; what is committed or saved stays, and the next run goes on (again: at once)")

    def _end(self, number: int, frame: FrameType | None) -> None:
        if not self.asked_to_end:
            self.asked_to_end = True
            self._tell("asked to end: the work in hand is finished, nothing new begins; the next run goes on")

    def _tell(self, text: str) -> None:
        # Not through sys.stderr: the signal may have interrupted it in the middle of a line.
        os.write(2, f"\n{text}\n".encode())
        self.messages += 1


class Console:
    """The reporter of one run of a stage. Implements `nfm.stages.base.Reporter`."""

    def __init__(
        self, stage: str, events: Path, stop: StopRequest, lock: Lock | None = None,
        clock: Callable[[], float] = time.monotonic, copies: Path | None = None,
    ):  # fmt: skip
        inside(events.parent, events.name).mkdir(exist_ok=True)
        self.stage = stage
        # Workers of one store on several hosts write at the same time, each to its own file. Containers can have the
        # same host name and process number: in a bucket, a name that two had would lose the events of one.
        name = f"{units.stamp()}-{socket.gethostname()}-{os.getpid()}.jsonl"
        self._events = (events / name).open("a", buffering=1, encoding="utf-8")
        self._copy = EventCopy(events / name, copies / name) if copies is not None else None
        self._stop = stop
        self._lock = lock
        self._clock = clock
        self._told = self._logged = self._began = clock()
        self._drawn = float("-inf")
        self._live = Live(sys.stderr) if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else None
        self._messages = stop.messages
        self._count: tuple[str, int] | None = None
        self._done = self._first = 0
        self._rate = Rate(0, self._began)
        self._starting = False

    @property
    def stopping(self) -> bool:
        return self._stop.asked or (self._lock is not None and self._lock.lost)

    @property
    def ending(self) -> bool:
        return self._stop.asked_to_end or self.stopping

    def check_lock(self) -> None:
        """Raises `Held` if another process took over the artifact. Then nothing may be written to it."""
        if self._lock is not None:
            self._lock.check()

    def say(self, text: str) -> None:
        self.finish()
        self._drawn = float("-inf")  # the table is drawn again at the next progress
        click.echo(f"{self.stage}: {masked(legible(text))}", err=True)

    def log(self, kind: str, **values: Any) -> None:
        with contextlib.suppress(OSError):  # a full disk must not hide the error that it caused
            self._events.write(
                json.dumps({"time": round(time.time(), 3), "kind": kind, **masked_in(values)}, default=str) + "\n"
            )

    def progress(self, done: int, total: int, unit: str, workers: Workers = (), **figures: Any) -> None:
        """`done` of `total` units, with a row for each worker and other figures.

        The rate is over the last minutes. Units in the first call are not counted, because an earlier run did them.
        The time until the first units of a training is not counted either: it may compile.
        """
        now = self._clock()
        if self._count is None:
            self._told = self._logged = now - PLAIN_SECONDS + FIRST_SECONDS
        if (unit, total) != self._count or done < self._done:
            self._count, self._began, self._first, self._rate = (unit, total), now, done, Rate(done, now)
            self._starting = True
        elif self._starting and done > self._first:
            self._starting = False
            if not workers:
                self._first, self._rate = done, Rate(done, now)
                self._told = self._logged = now - PLAIN_SECONDS + FIRST_SECONDS
        self._done = done
        self._rate.add(done, now)
        # A new count has no rate yet. Its line waits for one, but not for ever.
        late = 0.0 if done > self._first else PLAIN_SECONDS
        logs = now - self._logged >= EVENT_SECONDS + late or done == total
        tells = now - self._told >= PLAIN_SECONDS + late
        draws = self._live is not None and (now - self._drawn >= DRAW_SECONDS or done == total)
        if not (logs or draws or tells):
            return
        rate = self._rate.per_second(done, now)
        left = (total - done) / rate if rate > 0 else None
        shares = {part: round(statistics.median(row[part] for row in workers), 3) for part in PARTS} if workers else {}
        if logs:
            self._logged = now
            rows = {"shares": shares, "workers": list(workers[:LOGGED_WORKERS])} if workers else {}
            seconds = None if left is None else round(left, 1)
            values = {"per_second": round(rate, 2), "seconds_left": seconds, **figures, **rows}
            self.log("PROGRESS", done=done, total=total, unit=unit, **values)
        if self._live is not None:
            if draws:
                self._draw(self._live, done, total, unit, rate, workers, figures)
        elif tells:
            self._told = now
            self._tell(done, total, unit, rate, left, shares, len(workers), figures)

    def _tell(
        self, done: int, total: int, unit: str, rate: float, left: float | None, shares: Mapping[str, float],
        workers: int, figures: Mapping[str, Any],
    ) -> None:  # fmt: skip
        words = [f"{done:,} of {total:,} {unit}"]
        words += [units.rate(rate, unit)] if rate > 0 else []
        words += [f"{units.clock(left)} left"] if left is not None else []
        words += [f"{key} {_figure(value)}" for key, value in figures.items()]
        if shares:
            parts = ", ".join(f"{part} {percent(share)}" for part, share in shares.items())
            words.append(f"{workers} workers, in the median {parts}" if workers > 1 else parts)
        self.say(", ".join(words))

    def _draw(
        self, live: Live, done: int, total: int, unit: str, rate: float, workers: Workers, figures: Mapping[str, Any]
    ) -> None:
        from tqdm import tqdm

        now = self._drawn = self._clock()
        if self._messages != self._stop.messages:
            self._messages = self._stop.messages
            live.forget()
        columns, lines = live.size()
        postfix = ", ".join(f"{key}={_figure(value)}" for key, value in figures.items())
        bar = tqdm.format_meter(
            done, total, now - self._began, ncols=columns - 1, prefix=self.stage, unit=f" {unit}", rate=rate or None,
            postfix=postfix,
        )  # fmt: skip
        live.draw([bar, *worker_lines(workers, unit, lines - 2)])

    def finish(self) -> None:
        """Removes the table, so that lines can follow. The next progress draws it again."""
        if self._live is not None:
            if self._messages != self._stop.messages:
                self._messages = self._stop.messages
                self._live.forget()
            self._live.clear()

    def close(self) -> None:
        self.finish()
        with contextlib.suppress(OSError):
            self._events.close()
        if self._copy is not None:
            self._copy.close()


def _figure(value: Any) -> str:
    return units.figure(value) if isinstance(value, float) else str(value)
