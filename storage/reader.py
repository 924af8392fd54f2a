"""Batches from mapped shards: gathered and converted by one thread, ahead of the consumer, into buffers used
again.

A reader's state counts what was yielded, never what was prefetched; loaded on any number of ranks, it goes on
with the record that comes next. Two sets of buffers take turns, so a batch is valid until the next one is
asked for.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nfm.storage.batch import Batch, Buffers, Source
from nfm.storage.device import Upload
from nfm.storage.errors import StateMismatch
from nfm.storage.order import Order
from nfm.storage.ranks import find_rank


@dataclass(frozen=True)
class _Filled:
    fields: dict[str, Any]
    buffers: Buffers
    draw: int
    epoch: int
    consumed: int  # records of the epoch, over all ranks, after this batch


class BatchReader:
    """An iterator of `Batch`; `state_dict` and `load_state_dict` resume it exactly, on any number of ranks.

    `wait_seconds` is the total time the consumer waited. Reading begins at the first `next` and stops at the
    end, on an error, at `close`, or when the reader is dropped; a `next` after that goes on from the state.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        *,
        epochs: int | None = 1,
        rank: int | None = None,
        world_size: int | None = None,
        device: Any = None,
        copy: bool = False,
        prefetch: bool = True,
    ) -> None:
        self.rank, self.world_size = find_rank(rank, world_size)
        if order.batch_size % self.world_size:
            raise ValueError(
                f"batch_size {order.batch_size} counts the records of all ranks: make it divisible by the "
                f"world size {self.world_size}"
            )
        if order.last == "drop" and order.batch_size > len(source):
            raise ValueError(
                f"batch_size {order.batch_size} exceeds the {len(source)} records there are: lower it, or "
                "pass last='keep'"
            )
        self.epoch = 0
        self.consumed = 0
        self.wait_seconds = 0.0
        self._source = source
        self._order = order
        self._epochs = epochs
        self._upload = None if device is None else Upload(device)
        self._copy = copy
        self._prefetch = prefetch
        self._free: queue.SimpleQueue[Buffers | None] = queue.SimpleQueue()
        self._in_use: Buffers | None = None
        self._filled: Iterator[_Filled] | None = None
        self._stop: Callable[[], Any] | None = None

    def __iter__(self) -> BatchReader:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            if self._filled is None:
                self._filled = self._start()
            elif self._in_use is not None:
                self._free.put(self._new_buffers() if self._copy else self._in_use)
            filled = next(self._filled)
        except BaseException:  # the end, an error of the thread, or an interrupt: all leave no thread behind
            self.close()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - started
        self._in_use = filled.buffers
        self.epoch, self.consumed = filled.epoch, filled.consumed
        if self._upload is not None:
            self._upload.hand_over(filled.fields)
        fields = {name: filled.fields.get(name) for name in ("image", "noise", "label", "slot")}
        return Batch(**fields, draw=filled.draw, epoch=filled.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the reader stands: counts of what was yielded, and the identity of what is read."""
        return self._identity() | {
            "batch_size": self._order.batch_size,
            "epoch": self.epoch,
            "consumed": self.consumed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the last batch that the reader with this state yielded. Raises StateMismatch.

        The number of ranks may differ; so may the batch size, and then the epoch's next batch starts at the
        next record all the same.
        """
        for name, here in self._identity().items():
            if name not in state or state[name] != here:
                raise StateMismatch(
                    f"reader state: {name} is {state.get(name)!r} there and {here!r} here; open the store, "
                    "the generation and the seed that the state was saved with, or start without a state"
                )
        self.close()
        self.epoch, self.consumed = int(state["epoch"]), int(state["consumed"])

    def close(self) -> None:
        """Stops reading ahead; a batch in hand stays valid."""
        if self._stop is not None:
            self._stop()
        self._free = queue.SimpleQueue()
        self._stop = self._filled = self._in_use = None

    def _identity(self) -> dict[str, Any]:
        return {
            "order_key": self._source.order_key,
            "content_digest": self._source.content_digest,
            "generation": self._source.generation,
            "filter": None,
            "weights": None,
            "seed": self._order.seed,
            "shuffle": self._order.name,
        }

    def _new_buffers(self) -> Buffers:
        return Buffers(self._source, self._order.batch_size // self.world_size, self._upload)

    def _start(self) -> Iterator[_Filled]:
        free = self._free
        batches = _fill_batches(
            self._source,
            self._order,
            self._epochs,
            self.epoch,
            self.consumed,
            self.rank,
            self.world_size,
            free,
        )
        free.put(self._new_buffers())
        if not self._prefetch:
            return batches
        free.put(self._new_buffers())
        ready: queue.SimpleQueue[_Filled | BaseException | None] = queue.SimpleQueue()
        # The thread knows the queues only, not the reader: a dropped reader is collected and stops it.
        thread = threading.Thread(target=_read_ahead, args=(batches, ready), name="nfm-reader", daemon=True)
        self._stop = weakref.finalize(self, _stop_thread, free, thread)
        thread.start()
        return _received(ready)


def _fill_batches(
    source: Source,
    order: Order,
    epochs: int | None,
    epoch: int,
    consumed: int,
    rank: int,
    world_size: int,
    free: queue.SimpleQueue[Buffers | None],
) -> Iterator[_Filled]:
    while epochs is None or epoch < epochs:
        draw = source.draw(epoch)
        for rows in order.batches(epoch, consumed):
            consumed += len(rows)
            mine = rows[len(rows) * rank // world_size : len(rows) * (rank + 1) // world_size]
            buffers = free.get()
            if buffers is None:
                return
            yield _Filled(buffers.fill(source, draw, mine), buffers, draw, epoch, consumed)
        epoch, consumed = epoch + 1, 0


def _read_ahead(batches: Iterator[_Filled], ready: queue.SimpleQueue[_Filled | BaseException | None]) -> None:
    try:
        for filled in batches:
            ready.put(filled)
            del filled
        ready.put(None)
    except BaseException as error:  # raised again in the consumer's thread
        ready.put(error)


def _received(ready: queue.SimpleQueue[_Filled | BaseException | None]) -> Iterator[_Filled]:
    while (item := ready.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


def _stop_thread(free: queue.SimpleQueue[Buffers | None], thread: threading.Thread) -> None:
    free.put(None)
    if thread is not threading.current_thread() and thread.ident is not None:
        thread.join()
