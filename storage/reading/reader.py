"""Batches from mapped shards: threads gather and convert them ahead of the consumer, and memory is reused.

The state of a reader counts yielded records, not prefetched ones. It can be loaded on any number of ranks and continues
with the next record. A batch does not change as long as anything refers to a part of it. A loop that holds one batch
uses three sets of arrays in turn, and four where two batches are filled at a time.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NoReturn, TypedDict

import numpy as np
import numpy.typing as npt

from nfm.storage.errors import StateMismatch, StorageError
from nfm.storage.errors.arguments import MOST_EPOCH, WrongArgument, checked, checked_later, whole
from nfm.storage.reading.batch import Assembly, Batch
from nfm.storage.reading.device import Upload
from nfm.storage.reading.readahead import ReadAhead
from nfm.storage.reading.soften import Softener
from nfm.storage.reading.stream import Planned, Stream, batches_in, batches_of, plan

_LARGE = 1 << 20  # bytes; of such batches two are filled at a time: one copies while the other has Python's lock


class ReadOptions(TypedDict, total=False):
    """The keyword arguments that every `batches` takes.

    - `last`: "drop" (default) or "keep" the batch at the end of an epoch if it is not full.
    - `rank` and `world_size`: which part of every batch to read; by default those of torch.distributed.
    - `device`: a torch device; the batches are then tensors there instead of numpy arrays.
    - `prefetch`: whether threads read ahead; on by default.
    - `fields`: names of row-scoped fields to join.
    - `raw`: keep the stored dtypes and convert nothing.
    - `soften`: rho in [0, 1). The noise z becomes sqrt(1 - rho^2) z + rho eps. eps ~ N(0, I) is new in every epoch, and
      the same for a record whichever rank reads it.
    """

    last: Literal["drop", "keep"]
    rank: int | None
    world_size: int | None
    device: Any
    prefetch: bool
    fields: Sequence[str]
    raw: bool
    soften: float


@dataclass(frozen=True)
class _Filled:
    arrays: dict[str, Any]
    places: npt.NDArray[np.int64]
    epoch: int
    consumed: int  # records of the epoch, over all ranks, after this batch


class BatchReader:
    """An iterator of `Batch`. `state_dict` and `load_state_dict` resume it exactly, on any number of ranks.

    `wait_seconds` is the total time that the caller has waited for batches. Reading begins at the first `next`. It
    stops at the end, on an error, at `close`, or when nothing refers to the reader any more. After an error a later
    `next` continues from the state; after `close` it raises StorageError. With `turns=(skip, step)` it reads every
    step-th batch after the first `skip`, so that workers can share a stream.
    """

    @checked(stream=checked_later, turns=checked_later)
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
        self._soften = soften
        softener = Softener(self._soften, int(stream.identity["seed"])) if soften else None
        share = -(-min(batch_size, stream.most) // self.world_size)
        self._assembly = Assembly(stream.sources, share, fields, raw, self._upload, softener)
        self._prefetch = prefetch
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: fill one more batch; False: stop
        self._filled: Iterator[_Filled] | None = None
        self._stop: weakref.finalize[Any, Any] | None = None
        self._process = os.getpid()
        self._closed = False
        self._lock = threading.RLock()  # threads that share a reader get different batches

    def __iter__(self) -> BatchReader:
        return self

    def __len__(self) -> int:
        """The number of batches still to come in all epochs. Raises TypeError if it never ends."""
        if self._epochs is None:
            raise TypeError("batches without end have no length: pass epochs=")
        skip, step = self._turns
        if self.epoch >= self._epochs:
            return 0
        how = self._batch_size, self._drop_last
        here = batches_of(max(0, self._stream.rows(self.epoch) - self.consumed), *how)
        left = here + batches_in(self._stream, range(self.epoch + 1, self._epochs), *how)
        return max(0, -(-(left - skip) // step))

    def __bool__(self) -> bool:
        return True

    def __enter__(self) -> BatchReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a BatchReader cannot be pickled, its thread reads ahead: send the store and `state_dict()` to the other "
            "process and make the reader there; a DataLoader takes `as_torch_dataset`, and one with workers too"
        )

    def __next__(self) -> Batch:
        if self._process != os.getpid():
            self._forked()
        with self._lock:
            return self._next()

    def _next(self) -> Batch:
        self._check_open()
        started = time.perf_counter()
        try:
            if self._filled is None:
                self._filled = self._start()
            self._asked.put(True)
            filled = next(self._filled)
        except BaseException:  # the end, an error in the thread, or an interrupt: none may leave a thread behind
            self._halt()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - started
        self.epoch, self.consumed = filled.epoch, filled.consumed
        if self._upload is not None:
            self._upload.hand_over(filled.arrays)
        return self._assembly.batch(filled.arrays, filled.epoch, filled.places)

    def __repr__(self) -> str:
        return f"BatchReader({self.summary}; after {self.consumed} of epoch {self.epoch})"

    @property
    def summary(self) -> str:
        """What an epoch yields and what it leaves out, in words."""
        rows = self._stream.rows(self.epoch)
        left = rows % self._batch_size
        kept = f"the last {left} dropped each epoch (last='keep' reads them)" if self._drop_last else "all of them read"
        return f"{rows} records an epoch in batches of {self._batch_size}, {kept if left else 'none left over'}"

    @property
    def allocated(self) -> dict[str, int]:
        """The number of arrays allocated so far, by field. It stays small unless batches are kept."""
        return self._assembly.allocated

    def state_dict(self) -> dict[str, Any]:
        """The position and the identity of the reader, as a dict that JSON can hold."""
        return {
            **self._stream.identity,
            **({"soften": self._soften} if self._soften else {}),
            "batch_size": self._batch_size,
            "epoch": self.epoch,
            "consumed": self.consumed,
        }

    @checked()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the last batch that the reader with this state yielded.

        The number of ranks may differ. So may the batch size: the next batch still starts at the next record. Raises
        StateMismatch if the state is of another store, generation, seed or order.
        """
        self._check_open()
        self.check(state)
        if self._epochs is not None and state["epoch"] >= self._epochs:
            raise StateMismatch(
                f"reader state: epoch is {state['epoch']} there, and this reader has epochs 0 to {self._epochs - 1}: "
                f"read with epochs={state['epoch'] + 1} or more, or start without a state"
            )
        self._halt()
        self.epoch, self.consumed = int(state["epoch"]), int(state["consumed"])

    @checked()
    def check(self, state: Mapping[str, Any]) -> None:
        """Raises StateMismatch unless the state belongs to this order of records."""
        for name in (*self._stream.identity, "batch_size", "epoch", "consumed"):
            if name not in state:
                raise StateMismatch(f"reader state: it has no {name}; give a whole one, as `state_dict` returns it")
        softened = state.get("soften", 0.0)
        if softened != self._soften:
            raise StateMismatch(
                f"reader state: soften is {softened} there and {self._soften} here; read with soften={softened}, or "
                "start without a state"
            )
        # Last the order's digest, which differs where one of the others does.
        for name, here in sorted(self._stream.identity.items(), key=lambda item: item[0] == "order_key"):
            if state[name] != here:
                raise StateMismatch(
                    f"reader state: {name} is {state[name]!r} there and {here!r} here; open the store, the "
                    "generation, the seed and the filter that the state was saved with, or start without a state"
                )
        whole(1)("state['batch_size']", state["batch_size"])
        epoch = whole(0, MOST_EPOCH)("state['epoch']", state["epoch"])
        consumed = whole()("state['consumed']", state["consumed"])
        if consumed > (records := self._stream.rows(epoch)):
            raise StateMismatch(
                f"reader state: consumed is {consumed:,} there, and epoch {epoch} has {records:,} records; give a "
                "state as `state_dict` returns it, or start without one"
            )

    def close(self) -> None:
        """Ends the reader. Batches that were yielded stay valid, and so does its state."""
        self._closed = True
        self._halt()

    def _check_open(self) -> None:
        if self._closed:
            raise StorageError(
                "this reader is closed: make another one with `batches`; `load_state_dict` makes it continue from this "
                "one's `state_dict()`"
            )

    def _halt(self) -> None:
        """Stops reading ahead; the next batch starts it again."""
        if self._stop is not None:
            self._stop()
        self._forget()

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
        asked = _as_asked(plans, self._asked)
        if not self._prefetch:
            self._stop = weakref.finalize(self, _stop_threads, self._asked, None, ahead)
            return _each_filled(asked, self._assembly)
        large = self._assembly.bytes_per_batch >= _LARGE
        batches = _two_at_a_time(asked, self._assembly) if large else _each_filled(asked, self._assembly)
        for _ in range(2 if large else 1):
            self._asked.put(True)
        # The threads refer only to the queues, not to the reader. So a reader that is dropped is collected and stops
        # them.
        ready = queue.SimpleQueue[_Filled | Future[_Filled] | BaseException | None]()
        thread = threading.Thread(target=_read_ahead, args=(batches, ready), name="nfm-reader", daemon=True)
        self._stop = weakref.finalize(self, _stop_threads, self._asked, thread, ahead)
        thread.start()
        items: Iterator[_Filled | Future[_Filled] | BaseException] = iter(ready.get, None)
        return map(_received, items)  # keeps no reference to yielded items

    def _forget(self) -> None:
        self._asked = queue.SimpleQueue()
        self._stop = self._filled = None
        self._assembly.clear()

    def _forked(self) -> None:
        """Forgets the threads of the parent process; a fork does not copy them."""
        if self._stop is not None:
            self._stop.detach()
        self._forget()
        self._process = os.getpid()
        self._lock = threading.RLock()


def _check_sizes(stream: Stream, batch_size: int, last: str, world_size: int) -> None:
    check_shared(batch_size, world_size)
    if last == "drop":
        check_enough(batch_size, stream.least)


def check_shared(batch_size: int, processes: int) -> None:
    """Raises WrongArgument if the records of a batch cannot be shared out evenly. Configs are checked with it too."""
    if batch_size % processes:
        raise WrongArgument(
            "batch_size", f"{batch_size} is shared by {processes} processes: make it a multiple of {processes}"
        )


def check_enough(batch_size: int, records: int) -> None:
    """Raises WrongArgument if not even one batch could be filled.

    Configs are checked with it before their data exists.
    """
    if batch_size > records:
        raise WrongArgument(
            "batch_size", f"{batch_size} exceeds the {records} records there are: lower it", "pass last='keep'"
        )


def _as_asked(plans: Iterator[Planned], asked: queue.SimpleQueue[bool]) -> Iterator[Planned]:
    for planned in plans:
        if not asked.get():
            return
        yield planned


def _filled(assembly: Assembly, planned: Planned) -> _Filled:
    return _Filled(assembly.fill(planned.records), planned.places, planned.epoch, planned.consumed)


def _each_filled(plans: Iterator[Planned], assembly: Assembly) -> Iterator[_Filled]:
    for planned in plans:
        yield _filled(assembly, planned)


def _two_at_a_time(plans: Iterator[Planned], assembly: Assembly) -> Iterator[Future[_Filled]]:
    with ThreadPoolExecutor(2, "nfm-filler") as threads:
        for planned in plans:
            yield threads.submit(_filled, assembly, planned)


def _read_ahead(
    batches: Iterator[_Filled] | Iterator[Future[_Filled]],
    ready: queue.SimpleQueue[_Filled | Future[_Filled] | BaseException | None],
) -> None:
    try:
        for filled in batches:
            ready.put(filled)
            del filled
        ready.put(None)
    except BaseException as error:  # raised again in the consumer's thread
        ready.put(error)


def _received(item: _Filled | Future[_Filled] | BaseException) -> _Filled:
    if isinstance(item, BaseException):
        raise item
    return item if isinstance(item, _Filled) else item.result()


def _stop_threads(asked: queue.SimpleQueue[bool], thread: threading.Thread | None, ahead: ReadAhead | None) -> None:
    asked.put(False)
    if ahead is not None:
        ahead.stop()
    if thread is not None and thread is not threading.current_thread() and thread.ident is not None:
        thread.join()


def find_rank(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """(rank, world size): from torch.distributed if it is initialised, else from the arguments, else (0, 1).

    Raises StorageError if they disagree, and if WORLD_SIZE in the environment is above 1 but no rank is given: every
    process would read the same records.
    """
    if (rank is None) != (world_size is None):
        raise WrongArgument("rank", f"is {rank} and world_size is {world_size}: pass both or neither")
    if rank is not None and world_size is not None and not 0 <= rank < world_size:
        raise WrongArgument("rank", f"is {rank}, which is outside 0..{world_size - 1}")
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        found = int(distributed.get_rank()), int(distributed.get_world_size())
        if rank is not None and found != (rank, world_size):
            raise StorageError(
                f"torch.distributed says rank {found[0]} of {found[1]}, the arguments rank {rank} of "
                f"{world_size}: leave the arguments out"
            )
        return found
    if rank is not None and world_size is not None:
        return rank, world_size
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise StorageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment and nobody said which rank this "
            "is: initialise torch.distributed first, or pass rank= and world_size="
        )
    return 0, 1
