"""What a run tells: a progress bar on a terminal, plain lines elsewhere, and the same figures as lines in `events/`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from nfm.pipeline.lock import Lock

PLAIN_SECONDS = 15.0
EVENT_SECONDS = 30.0


class StopRequest:
    """Set by SIGINT and SIGTERM; stages ask for it between units of work."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle both signals for the time of a run; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # Not through sys.stderr, which the signal may have interrupted in the middle of a line.
        os.write(2, b"\nstopping after the work in hand (again: at once; either way the next run goes on)\n")


class Console:
    """The reporter of one stage's run: implements `nfm.stages.stage.Reporter`."""

    def __init__(self, stage: str, events: Path, stop: StopRequest, lock: Lock | None = None):
        events.mkdir(exist_ok=True)
        self.stage = stage
        self._events = (events / f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.jsonl").open("a", buffering=1)
        self._stop = stop
        self._lock = lock
        self._bar: Any = None
        self._started = self._told = self._logged = time.monotonic()
        self._count: tuple[str, int] | None = None
        self._first = self._done = 0

    @property
    def stopping(self) -> bool:
        return self._stop.asked or (self._lock is not None and self._lock.lost)

    def check_lock(self) -> None:
        """Raises `Held` when another process took the artifact over: nothing may be written to it then."""
        if self._lock is not None:
            self._lock.check()

    def say(self, text: str) -> None:
        line = f"{self.stage}: {text}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            click.echo(line, err=True)

    def log(self, kind: str, **values: Any) -> None:
        with contextlib.suppress(OSError):  # a full disk must not hide the error that it caused
            self._events.write(json.dumps({"time": round(time.time(), 3), "kind": kind, **values}, default=str) + "\n")

    def progress(self, done: int, total: int, unit: str, **figures: Any) -> None:
        """`done` of `total` units; the rate counts from a count's first call: resumed work is not counted twice."""
        now = time.monotonic()
        if (unit, total) != self._count or done < self._done:
            self._count, self._first, self._started = (unit, total), done, now
        self._done = done
        rate = (done - self._first) / max(now - self._started, 1e-9)
        left = (total - done) / rate if rate > 0 else None
        if now - self._logged >= EVENT_SECONDS or done == total:
            self._logged = now
            self.log("PROGRESS", done=done, total=total, unit=unit, per_second=round(rate, 2), **figures)
        if sys.stderr.isatty():
            self._show_bar(done, total, unit, figures)
        elif now - self._told >= PLAIN_SECONDS:
            self._told = now
            words = [f"{done:,} of {total:,} {unit}", f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"]
            words += [f"{time_left(left)} left"] if left is not None else []
            self.say(", ".join(words + [f"{key} {_figure(value)}" for key, value in figures.items()]))

    def _show_bar(self, done: int, total: int, unit: str, figures: dict[str, Any]) -> None:
        if self._bar is None or self._bar.total != total or self._bar.unit != f" {unit}":
            from tqdm import tqdm

            self.finish()
            self._bar = tqdm(total=total, initial=done, unit=f" {unit}", desc=self.stage, file=sys.stderr, leave=False)
        self._bar.set_postfix({key: _figure(value) for key, value in figures.items()}, refresh=False)
        self._bar.update(done - self._bar.n)

    def finish(self) -> None:
        """Take the bar away, so that lines can follow."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        self.finish()
        with contextlib.suppress(OSError):
            self._events.close()


def last_progress(events: Path) -> str:
    """How far the work in a folder came, by the last PROGRESS line of its newest events."""
    for path in sorted(events.glob("*.jsonl"), reverse=True):
        for line in reversed(path.read_text().splitlines()):
            if '"PROGRESS"' in line and line.endswith("}"):
                event = json.loads(line)
                return f"{event['done']:,} of {event['total']:,} {event['unit']}"
    return ""


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def time_left(seconds: float | None) -> str:
    """`75` -> `1m15s`."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
