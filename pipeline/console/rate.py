"""The current speed of work, from counts as they come."""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 180.0
WIDEST_SECONDS = 3600.0  # a pause is forgotten after an hour
_SAMPLE_SECONDS = 1.0  # counts that come faster are ignored


class Rate:
    """Units per second over the last minutes. An earlier run did the first `first` units.

    If counts come in steps that are far apart, such as whole shards, the window grows to several steps.
    """

    def __init__(self, first: int, now: float):
        self._samples = deque([(now, first)])

    def add(self, done: int, now: float) -> None:
        """`done` units in total at this time. A count without change adds nothing."""
        at, before = self._samples[-1]
        if done > before and (now - at >= _SAMPLE_SECONDS or len(self._samples) == 1):
            self._samples.append((now, done))

    def per_second(self, done: int, now: float) -> float:
        """The rate at this time, with `done` units done; 0 as long as there is none."""
        while len(self._samples) > 2 and self._samples[1][0] <= now - self._window(now):
            self._samples.popleft()
        at, before = self._samples[0]
        return (done - before) / max(now - at, 1e-9)

    def _window(self, now: float) -> float:
        times = [at for at, _ in self._samples]
        longest = max(after - before for before, after in zip(times, [*times[1:], now]))
        return min(max(WINDOW_SECONDS, 4 * longest), WIDEST_SECONDS)
