"""Threads that work a little ahead of their consumer, and stopwatches that show where time goes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_LOOK_SECONDS = 0.1  # how often a waiting thread checks whether it should stop


class Stopwatch:
    """Adds up seconds: `with watch:` around work, or `over` an iterator for the time that its items take."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def __enter__(self) -> Stopwatch:
        self._since = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._since

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items; the time that each took is added."""
        iterator = iter(items)
        while True:
            with self:
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


class Ahead(Iterator[T], Generic[T]):
    """An iterator over `items`, which its own thread makes in order, at most `depth` ahead.

    An exception in the thread is raised by `next`. After `cancel` the thread ends when it has made the current item,
    and a waiting caller gets StopIteration. `with running(...)` ends several in a chain.
    """

    def __init__(self, items: Iterable[T], depth: int = 2) -> None:
        self._items = items
        self._made: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
        self._arrived: tuple[str, Any] | None = None
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="nfm-ahead", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        while not self._cancelled.is_set():
            if self.wait(_LOOK_SECONDS):
                return self.take()
        raise StopIteration

    def wait(self, seconds: float) -> bool:
        """Waits up to `seconds`; returns whether `take` has an answer."""
        if self._arrived is None:
            with suppress(queue.Empty):
                self._arrived = self._made.get(timeout=seconds)
        return self._arrived is not None

    def take(self) -> T:
        """The next item; StopIteration at the end. Call it only after `wait` returned True."""
        assert self._arrived is not None
        (kind, value), self._arrived = self._arrived, None
        if kind == "item":
            return value
        self._cancelled.set()
        raise StopIteration if kind == "end" else value

    def cancel(self) -> None:
        """Tells the thread to end, and returns at once."""
        self._cancelled.set()

    def join(self) -> None:
        """Waits until the thread ends, after `cancel` or the last item."""
        self._thread.join()

    def _produce(self) -> None:
        try:
            for item in self._items:
                if not self._put(("item", item)):
                    return
        except BaseException as error:
            self._put(("error", error))
        else:
            self._put(("end", None))
        finally:
            if isinstance(self._items, Generator):
                self._items.close()

    def _put(self, entry: tuple[str, Any]) -> bool:
        while not self._cancelled.is_set():
            try:
                self._made.put(entry, timeout=_LOOK_SECONDS)
                return True
            except queue.Full:
                continue
        return False


@contextmanager
def running(*stages: Ahead[Any]) -> Iterator[None]:
    """Ends the stages at the end of the block, so that no thread continues. An interrupt does not wait for them.

    A user who interrupts twice wants to leave at once, not after the current batch. The threads are daemons and are
    left running.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        _end(stages, wait=False)
        raise
    except BaseException:
        _end(stages, wait=True)
        raise
    else:
        _end(stages, wait=True)


def _end(stages: Iterable[Ahead[Any]], wait: bool) -> None:
    for stage in stages:
        stage.cancel()
    for stage in stages if wait else ():
        stage.join()
