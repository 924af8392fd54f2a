"""A map on several threads that keeps the order. Reading, hashing, decoding and numpy release Python's lock."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_LOOK_SECONDS = 0.5  # longest delay until an interrupt is noticed that comes just before the wait


def parallel(
    action: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int | None = None,
    ahead: int | None = None,
    stop: threading.Event | None = None,
) -> Generator[Result, None, None]:
    """`action` of each item, in the order of the items, on `threads` threads (default: one for each core).

    At most `ahead` items (default: four for each thread) are started before their results are taken, so that neither
    items nor results fill the memory. An exception of an action is raised at its item's place. After it, and after an
    interrupt or an early close, items that have not started are dropped, and running ones are waited for. A long action
    should check `stop`, which is set first.
    """
    threads = threads or os.cpu_count() or 1
    ahead = ahead or 4 * threads
    begun: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="nfm")
    try:
        for item in items:
            begun.append(pool.submit(action, item))
            if len(begun) == ahead:
                yield _result(begun.popleft())
        while begun:
            yield _result(begun.popleft())
    except BaseException:  # also GeneratorExit, when the map is closed early
        if stop is not None:
            stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future[Result]) -> Result:
    while not future.done():
        wait([future], _LOOK_SECONDS)
    return future.result()
