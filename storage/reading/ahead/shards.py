"""Brings in shards before they are gathered: reads local files in large pieces, or fetches remote ones.

Gathering from files that are not in memory reads scattered pages, at a small part of the disk's speed. In windowed
order the shards of the next window are known. While the current window is used, threads read these shards from
beginning to end, so that they are in the page cache when they are needed.

Memory is limited to about two windows. When a shard that came from the disk has been used, the kernel is told to drop
its pages first if memory is short. The kernel is not told this about shards that were in memory before, so other epochs
and readers do not suffer.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import queue
import resource
import sys
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import chain

import numpy as np

from nfm.storage.errors import CorruptShard
from nfm.storage.layouts import Shard
from nfm.storage.layouts.mapped import Mapped
from nfm.storage.reading.stream import Planned, Records, Source

_PIECE = 4 << 20  # bytes read at a time
_MADV_COLD, _MADV_POPULATE_READ = 20, 22  # Linux 5.4 and 5.14
_LIBC = ctypes.CDLL(None, use_errno=True)
_LOCAL_THREADS = 2  # one reads the last piece of a file while the other reads the first piece of the next
_REMOTE_THREADS = 8  # an object store limits the speed of each connection

Key = tuple[int, int, int]  # store, draw, shard
_Read = Callable[[], Shard | None] | None  # a weak reference to a shard that was read from the disk


class ReadAhead:
    """Threads that bring in the shards of planned batches, in the order in which they are needed."""

    def __init__(self, sources: Sequence[Source], batches: int) -> None:
        self._sources = sources
        self._batches = batches
        self._wanted: Counter[Key] = Counter()
        self._found: dict[Key, Future[_Read]] = {}
        self._tasks: queue.SimpleQueue[tuple[Key, Future[_Read]] | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        count = _REMOTE_THREADS if any(source.remote for source in sources) else _LOCAL_THREADS
        self._threads = [
            threading.Thread(
                target=_bring_in, args=(self._tasks, sources, self._stopped), name="nfm-readahead", daemon=True
            )
            for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def over(self, plans: Iterable[Planned]) -> Iterator[Planned]:
        """Yields each plan when its shards are in memory. Up to `batches` later plans are prepared meanwhile.

        If a shard fails, its error is raised when its plan is due.
        """
        ahead: deque[tuple[Planned, list[Key]]] = deque()
        for planned in chain(plans, [None] * self._batches):
            if planned is not None:
                keys = self._shards(planned.records)
                self._request(keys)
                ahead.append((planned, keys))
            if ahead and (planned is None or len(ahead) > self._batches):
                first, needed = ahead.popleft()
                for key in needed:
                    self._found[key].result()
                yield first
                self._release(needed)

    def stop(self) -> None:
        """Stops the threads. A caller that waits for a shard gets CancelledError."""
        self._stopped.set()
        for future in list(self._found.values()):
            future.cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _shards(self, records: Records) -> list[Key]:
        found: list[Key] = []
        for store, draw, where in records.runs():
            shards = np.unique(records.slot[where] // self._sources[store].rows_per_shard)
            found += [(store, draw, shard) for shard in shards.tolist()]
        return found

    def _request(self, keys: list[Key]) -> None:
        self._wanted.update(keys)
        for key in keys:
            if key not in self._found:
                future = self._found[key] = Future[_Read]()
                self._tasks.put((key, future))
        if self._stopped.is_set():  # checked after the last task of the threads
            for key in keys:
                self._found[key].cancel()

    def _release(self, keys: list[Key]) -> None:
        for key in keys:
            self._wanted[key] -= 1
            if not self._wanted[key]:
                del self._wanted[key]
                read = self._found.pop(key).result()
                # keep a reference, otherwise the shard could be unmapped meanwhile
                shard = read() if read is not None else None
                for mapped in shard.maps if shard is not None else ():
                    _madvise(mapped.address, mapped.bytes, _MADV_COLD)


def _bring_in(
    tasks: queue.SimpleQueue[tuple[Key, Future[_Read]] | None], sources: Sequence[Source], stopped: threading.Event
) -> None:
    while (task := tasks.get()) is not None:
        (store, draw, number), future = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            shard = sources[store].shard(draw, number)
            from_disk = [read_through(mapped, stopped) for mapped in shard.maps]
            future.set_result(weakref.ref(shard) if any(from_disk) else None)
            del shard
        except BaseException as error:  # raised again in the thread that gathers
            future.set_exception(error)


def read_through(mapped: Mapped, stopped: threading.Event) -> bool:
    """Makes the kernel read a mapped file into memory, in order and without a copy. Returns whether some was missing.

    Calls go through ctypes, which lets other threads run meanwhile; Python's own madvise does not. Raises CorruptShard.
    """
    before = _faults_from_disk()
    _madvise(mapped.address, mapped.bytes, mmap.MADV_SEQUENTIAL)
    try:
        for start in range(0, mapped.bytes, _PIECE):
            if stopped.is_set():
                break
            _populate(mapped, start, min(_PIECE, mapped.bytes - start))
    finally:
        _madvise(mapped.address, mapped.bytes, mmap.MADV_NORMAL)
    return _faults_from_disk() > before


def _populate(mapped: Mapped, start: int, size: int) -> None:
    wrong = _madvise(mapped.address + start, size, _MADV_POPULATE_READ) if sys.platform == "linux" else errno.EINVAL
    if wrong == errno.EINVAL:  # before Linux 5.14: touching every page does the same
        _madvise(mapped.address + start, size, mmap.MADV_WILLNEED)
        piece = (ctypes.c_uint8 * size).from_address(mapped.address + start)
        np.ctypeslib.as_array(piece)[:: mmap.PAGESIZE].max()
    elif wrong:
        raise CorruptShard(f"{mapped.path}: cannot be read ({os.strerror(wrong)}); run `nfm audit` on its store")


def _faults_from_disk() -> int:
    """The page faults of this thread that read from the disk; 0 if unknown."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt if sys.platform == "linux" else 0


def _madvise(address: int, size: int, advice: int) -> int:
    """0, or the error number."""
    failed = _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(advice))
    return ctypes.get_errno() if failed else 0
