"""Batches from mapped shards: gathered and converted by one thread, ahead of the consumer, into buffers used again.

A reader's state counts what was yielded, never what was prefetched; loaded on any number of ranks, it goes on
with the record that comes next. Two sets of buffers take turns, so a batch is valid until the next one is
asked for.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypedDict

from nfm.storage.batch import Assembly, Batch, Buffers
from nfm.storage.device import Upload
from nfm.storage.errors import StateMismatch
from nfm.storage.ranks import find_rank
from nfm.storage.readahead import ReadAhead
from nfm.storage.soften import Softener
from nfm.storage.stream import Planned, Stream, plan


class ReadOptions(TypedDict, total=False):
    """How batches come, whatever they hold: the keyword arguments that every `batches` takes.

    `last`: "drop" (default) or "keep" the batch at the end of an epoch that is not full. `rank` and `world_size`:
    default torch.distributed's. `device`: torch tensors there instead of numpy arrays. `copy`: every batch stays
    valid, not only until the next one. `prefetch` (default): a thread reads ahead. `fields`: names of row-scoped
    fields to join. `raw`: the stored dtypes as they are, converted by the consumer. `soften`: rho in [0, 1), the noise
    becomes sqrt(1 - rho^2) z + rho eps with fresh eps ~ N(0, I) in every epoch, the same for a record whoever reads it.
    """

    last: Literal["drop", "keep"]
    rank: int | None
    world_size: int | None
    device: Any
    copy: bool
    prefetch: bool
    fields: Sequence[str]
    raw: bool
    soften: float


@dataclass(frozen=True)
class _Filled:
    arrays: dict[str, Any]
    buffers: Buffers
    epoch: int
    consumed: int  # records of the epoch, over all ranks, after this batch


class BatchReader:
    """An iterator of `Batch`; `state_dict` and `load_state_dict` resume it exactly, on any number of ranks.

    `wait_seconds` is the total time the consumer waited. Reading begins at the first `next` and stops at the
    end, on an error, at `close`, or when the reader is dropped; a `next` after that goes on from the state.
    With `turns=(skip, step)` it reads every step-th batch after the first `skip`, as workers that share a stream do.
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        epochs: int | None = 1,
        *,
        last: Literal["drop", "keep"] = "drop",
        rank: int | None = None,
        world_size: int | None = None,
        device: Any = None,
        copy: bool = False,
        prefetch: bool = True,
        fields: Sequence[str] = (),
        raw: bool = False,
        soften: float = 0.0,
        turns: tuple[int, int] = (0, 1),
    ) -> None:
        self.rank, self.world_size = find_rank(rank, world_size)
        _check_sizes(stream, batch_size, last, self.world_size)
        self.epoch = 0
        self.consumed = 0
        self.wait_seconds = 0.0
        self._stream = stream
        self._batch_size = batch_size
        self._epochs = epochs
        self._drop_last = last == "drop"
        self._turns = turns
        self._upload = None if device is None else Upload(device)
        self._soften = float(soften)
        softener = Softener(self._soften, int(stream.identity["seed"])) if soften else None
        self._assembly = Assembly(stream.sources, fields, raw, self._upload, softener)
        self._copy = copy
        self._prefetch = prefetch
        self._free: queue.SimpleQueue[Buffers | None] = queue.SimpleQueue()
        self._in_use: Buffers | None = None
        self._filled: Iterator[_Filled] | None = None
        self._stop: weakref.finalize[Any, Any] | None = None
        self._process = os.getpid()

    def __iter__(self) -> BatchReader:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        if self._process != os.getpid():
            self._forked()
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
            self._upload.hand_over(filled.arrays)
        return self._assembly.batch(filled.arrays, filled.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the reader stands: counts of what was yielded, and the identity of what is read; JSON's types."""
        return {
            **self._stream.identity,
            **({"soften": self._soften} if self._soften else {}),
            "batch_size": self._batch_size,
            "epoch": self.epoch,
            "consumed": self.consumed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the last batch that the reader with this state yielded. Raises StateMismatch.

        The number of ranks may differ; so may the batch size, and then the epoch's next batch starts at the
        next record all the same.
        """
        softened = float(state.get("soften", 0.0))
        if softened != self._soften:
            raise StateMismatch(
                f"reader state: soften is {softened} there and {self._soften} here; read with soften={softened}, or "
                "start without a state"
            )
        for name, here in self._stream.identity.items():
            if name not in state or state[name] != here:
                raise StateMismatch(
                    f"reader state: {name} is {state.get(name)!r} there and {here!r} here; open the store, the "
                    "generation, the seed and the filter that the state was saved with, or start without a state"
                )
        self.close()
        self.epoch, self.consumed = int(state["epoch"]), int(state["consumed"])

    def close(self) -> None:
        """Stops reading ahead; a batch in hand stays valid."""
        if self._stop is not None:
            self._stop()
        self._free = queue.SimpleQueue()
        self._stop = self._filled = self._in_use = None

    def _new_buffers(self) -> Buffers:
        return self._assembly.buffers(-(-self._batch_size // self.world_size))

    def _start(self) -> Iterator[_Filled]:
        skip, step = self._turns
        plans: Iterator[Planned] = plan(
            self._stream,
            self._batch_size,
            self._drop_last,
            self._epochs,
            self.epoch,
            self.consumed,
            self.rank,
            self.world_size,
        )
        plans = islice(plans, skip, None, step)
        ahead = None
        if self._stream.lookahead:
            ahead = ReadAhead(self._stream.sources, -(-self._stream.lookahead // (self._batch_size * step)))
            plans = ahead.over(plans)
        free = self._free
        batches = _fill_batches(plans, self._assembly, free)
        free.put(self._new_buffers())
        thread, ready = None, queue.SimpleQueue[_Filled | BaseException | None]()
        if self._prefetch:
            free.put(self._new_buffers())
            # The threads know the queues only, not the reader: a dropped reader is collected and stops them.
            thread = threading.Thread(target=_read_ahead, args=(batches, ready), name="nfm-reader", daemon=True)
        self._stop = weakref.finalize(self, _stop_threads, free, thread, ahead)
        if thread is None:
            return batches
        thread.start()
        return _received(ready)

    def _forked(self) -> None:
        """Forgets the threads of the parent process, which a fork does not copy."""
        if self._stop is not None:
            self._stop.detach()
        self._stop = self._filled = self._in_use = None
        self._free = queue.SimpleQueue()
        self._process = os.getpid()


def _check_sizes(stream: Stream, batch_size: int, last: str, world_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
    if last not in ("drop", "keep"):
        raise ValueError(f"last is {last!r}: it must be 'drop' or 'keep'")
    if batch_size % world_size:
        raise ValueError(
            f"batch_size {batch_size} counts the records of all ranks: make it divisible by the world size {world_size}"
        )
    if last == "drop" and batch_size > stream.least:
        raise ValueError(
            f"batch_size {batch_size} exceeds the {stream.least} records there are: lower it, or pass last='keep'"
        )


def _fill_batches(
    plans: Iterator[Planned], assembly: Assembly, free: queue.SimpleQueue[Buffers | None]
) -> Iterator[_Filled]:
    for planned in plans:
        buffers = free.get()
        if buffers is None:
            return
        yield _Filled(assembly.fill(planned.records, buffers), buffers, planned.epoch, planned.consumed)


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


def _stop_threads(
    free: queue.SimpleQueue[Buffers | None], thread: threading.Thread | None, ahead: ReadAhead | None
) -> None:
    free.put(None)
    if ahead is not None:
        ahead.stop()
    if thread is not None and thread is not threading.current_thread() and thread.ident is not None:
        thread.join()
