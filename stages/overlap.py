"""Work in threads that keeps a little ahead of who consumes it, and stopwatches that tell where time goes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_LOOK_SECONDS = 0.1  # how often a producer whose queue is full asks whether it is still wanted


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
        """The items; the seconds that each took to come are added."""
        iterator = iter(items)
        while True:
            with self:
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


def ahead(items: Iterable[T], depth: int = 2) -> Generator[T]:
    """The items in their order, made by a thread of its own at most `depth` ahead.

    What the thread raises is raised here. Close the generator when not all items are taken: the thread has then ended.
    """
    made: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(depth)
    wanted = threading.Event()
    wanted.set()

    def put(entry: tuple[T | None, BaseException | None, bool]) -> bool:
        while wanted.is_set():
            try:
                made.put(entry, timeout=_LOOK_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((item, None, False)):
                    return
        except BaseException as error:
            put((None, error, True))
        else:
            put((None, None, True))
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=produce, name="nfm-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error, last = made.get()
            if error is not None:
                raise error
            if last:
                return
            yield item  # type: ignore[misc]
    finally:
        wanted.clear()
        thread.join()
