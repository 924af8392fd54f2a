"""One ordered map on several threads: reading, hashing, decoding and numpy release Python's lock."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_LOOK_SECONDS = 0.5  # an interrupt that comes just before the wait begins is seen after that time


def parallel(
    action: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int | None = None,
    ahead: int | None = None,
    stop: threading.Event | None = None,
) -> Generator[Result, None, None]:
    """`action` of each item, in the items' order, on `threads` threads (default: one a core).

    At most `ahead` items (default: four a thread) are begun before their results are taken, so that neither the items
    nor the results fill the memory. What an action raises is raised at its item's place. Then, and when the caller is
    interrupted or closes the map, what has not begun is dropped and what runs is waited for; an action that takes long
    looks at `stop`, which is set first.
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
    except BaseException:  # closing it early is GeneratorExit
        if stop is not None:
            stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future[Result]) -> Result:
    while not future.done():
        wait([future], _LOOK_SECONDS)
    return future.result()
