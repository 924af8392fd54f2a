"""Batches from mapped shards: threads gather and convert them ahead of the consumer, and memory is reused.

The state of a reader counts yielded records, not prefetched ones. It can be loaded on any number of ranks and continues
with the next record. A batch does not change as long as anything refers to a part of it. A loop that holds one batch
uses three sets of arrays in turn, and four where two batches are filled at a time.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, NoReturn, TypedDict

from nfm.storage.errors import StateMismatch, StorageError
from nfm.storage.errors.arguments import MOST_EPOCH, WrongArgument, checked, checked_later, whole
from nfm.storage.reading.ahead.batches import Filling
from nfm.storage.reading.ahead.shards import ReadAhead
from nfm.storage.reading.batch import Assembly, Batch
from nfm.storage.reading.device import Upload
from nfm.storage.reading.soften import Softener
from nfm.storage.reading.stream import Planned, Stream, batches_in, batches_of, plan


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
        self._filling: Filling | None = None
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
            if self._filling is None:
                self._filling = self._start()
            filled = self._filling.next()
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
        if self._filling is not None:
            self._filling.stop()
        self._filling = None
        self._assembly.clear()

    def _start(self) -> Filling:
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
        shards = None
        if self._stream.lookahead:
            shards = ReadAhead(self._stream.sources, -(-self._stream.lookahead // (self._batch_size * step)))
            plans = shards.over(plans)
        return Filling(plans, self._assembly, shards, self._prefetch)

    def _forked(self) -> None:
        """Forgets the threads of the parent process; a fork does not copy them."""
        if self._filling is not None:
            self._filling.forget()
        self._halt()
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
