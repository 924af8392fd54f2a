"""Planned batches are filled: in the consumer's thread, or ahead of it in threads of their own."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nfm.storage.reading.ahead.shards import ReadAhead
from nfm.storage.reading.batch import Assembly
from nfm.storage.reading.stream import Planned

_LARGE = 1 << 20  # bytes; of such batches two are filled at a time: one copies while the other has Python's lock


@dataclass(frozen=True)
class Filled:
    """What a batch is made of."""

    arrays: dict[str, Any]
    places: npt.NDArray[np.int64]
    epoch: int
    consumed: int  # records of the epoch, over all ranks, after this batch


_Item = Filled | Future[Filled] | BaseException


class Filling:
    """Filled batches in the order of their plans. With threads, one or two more than were asked for are filled.

    The threads refer to queues, not to this object. So with a reader that is dropped it is collected too, and stops
    them.
    """

    def __init__(self, plans: Iterator[Planned], assembly: Assembly, shards: ReadAhead | None, threads: bool) -> None:
        self._asked = queue.SimpleQueue[bool]()  # True: fill one more batch; False: stop
        plans = _as_asked(plans, self._asked)
        thread = None
        if threads:
            large = assembly.bytes_per_batch >= _LARGE
            batches = _two_at_a_time(plans, assembly) if large else _each_filled(plans, assembly)
            for _ in range(2 if large else 1):
                self._asked.put(True)
            ready = queue.SimpleQueue[_Item | None]()  # None: that was the last
            items: Iterator[_Item] = iter(ready.get, None)
            thread = threading.Thread(target=_pass_on, args=(batches, ready), name="nfm-reader", daemon=True)
            self._filled: Iterator[Filled] = map(_received, items)  # keeps no reference to what it yielded
        else:
            self._filled = _each_filled(plans, assembly)
        self._stop = weakref.finalize(self, _stop_threads, self._asked, thread, shards)
        if thread is not None:
            thread.start()

    def next(self) -> Filled:
        """The next batch. Raises StopIteration after the last, and what went wrong where it was filled."""
        self._asked.put(True)
        return next(self._filled)

    def stop(self) -> None:
        """Ends the threads, once, unless they are to be left alone. What was taken stays valid."""
        self._stop()

    def forget(self) -> None:
        """Leaves the threads alone: after a fork they are those of the parent process."""
        self._stop.detach()


def _as_asked(plans: Iterator[Planned], asked: queue.SimpleQueue[bool]) -> Iterator[Planned]:
    for planned in plans:
        if not asked.get():
            return
        yield planned


def _fill(assembly: Assembly, planned: Planned) -> Filled:
    return Filled(assembly.fill(planned.records), planned.places, planned.epoch, planned.consumed)


def _each_filled(plans: Iterator[Planned], assembly: Assembly) -> Iterator[Filled]:
    for planned in plans:
        yield _fill(assembly, planned)


def _two_at_a_time(plans: Iterator[Planned], assembly: Assembly) -> Iterator[Future[Filled]]:
    with ThreadPoolExecutor(2, "nfm-filler") as threads:
        for planned in plans:
            yield threads.submit(_fill, assembly, planned)


def _pass_on(batches: Iterator[Filled] | Iterator[Future[Filled]], ready: queue.SimpleQueue[_Item | None]) -> None:
    try:
        for filled in batches:
            ready.put(filled)
            del filled
        ready.put(None)
    except BaseException as error:  # raised again in the consumer's thread
        ready.put(error)


def _received(item: _Item) -> Filled:
    if isinstance(item, BaseException):
        raise item
    return item.result() if isinstance(item, Future) else item


def _stop_threads(asked: queue.SimpleQueue[bool], thread: threading.Thread | None, shards: ReadAhead | None) -> None:
    asked.put(False)
    if shards is not None:
        shards.stop()
    if thread is not None and thread is not threading.current_thread() and thread.ident is not None:
        thread.join()
