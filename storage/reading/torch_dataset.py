"""A reader for torch's DataLoader. Several workers take turns with the batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, Unpack

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from nfm.storage.errors import StateMismatch, StorageError
from nfm.storage.errors.arguments import WrongArgument, checked, checked_later, flag, shape, whole, wrong
from nfm.storage.reading.batch import Batch
from nfm.storage.reading.reader import BatchReader, ReadOptions, find_rank
from nfm.storage.reading.starts import Start, Starts
from nfm.storage.reading.stream import Stream, batches_in


class TensorBatch(dict[str, Tensor]):
    """A complete batch, as a dict. A DataLoader that would make batches of such batches fails."""


def _already_batches(batches: Any, **_: Any) -> NoReturn:
    raise StorageError(
        "these are complete batches, and this DataLoader would make batches of them: pass it batch_size=None; how many "
        "records a batch has is said to `as_torch_dataset`"
    )


default_collate_fn_map[TensorBatch] = _already_batches  # how torch is told of a type


class TorchBatches(IterableDataset[dict[str, Tensor]]):
    """Batches as dicts of CPU tensors: image, noise, label, slot, draw, store, and the requested fields.

    Batches are complete, so pass `batch_size=None` to the DataLoader; with another one it fails. The order is that of
    the reader, for any number of workers. The rank is that of the process that makes the dataset.

    Every iteration reads the next `epochs` epochs, whether or not the iteration before was read to its end. The first
    one starts at epoch 0. `set_epoch` sets the epoch of the next iteration; after `load_state_dict` it continues from
    the state. With `epochs=None` an iteration has no end, and the next one begins with the epoch after the last one
    that it began. Iterations are counted for the dataset, over all its loaders and their workers. With torchdata's
    StatefulDataLoader the state is exact.

    Workers copy every batch through shared memory, which takes many times longer than reading it. Iterate over
    `store.batches(device=...)` directly if you can. For a store at a URL every worker has its own cache, unless the
    store is opened with `cache=ShardCache(folder)`.
    """

    @checked(options=ReadOptions, stream=checked_later)
    def __init__(self, stream: Stream, batch_size: int, epochs: int | None = 1, **options: Unpack[ReadOptions]) -> None:
        super().__init__()
        for name in ("device", "prefetch"):
            if name in options:
                raise WrongArgument(name, "is not for a loader, which gets CPU tensors: use `batches` without one")
        self._stream = stream
        self._batch_size = batch_size
        self._epochs = epochs
        rank, world_size = find_rank(options.get("rank"), options.get("world_size"))
        self._options: ReadOptions = {**options, "rank": rank, "world_size": world_size}
        self._starts = Starts()
        self._own: Start | None = None  # the start in this worker's own state
        self._iterations = 0  # that this worker began
        self._turn: list[int] | None = None  # [worker, workers] after this process has yielded a batch
        self._first = 0  # the first epoch of the current iteration
        self._running = self._finished = False  # an iteration in this process
        self._reader = self._open()  # so that wrong options raise an error here, not in a worker

    def __len__(self) -> int:
        """The number of batches of the next iteration, from its beginning. Raises TypeError if it never ends."""
        if self._epochs is None:
            raise TypeError("batches without end have no length: pass epochs=")
        first, keeps = self._starts.next_epoch, self._options.get("last") == "keep"
        return batches_in(self._stream, range(first, first + self._epochs), self._batch_size, not keeps)

    def __repr__(self) -> str:
        return f"TorchBatches({self._reader.summary}; next: epoch {self._starts.next_epoch})"

    @checked()
    def set_epoch(self, epoch: int) -> None:
        """Sets the first epoch of the next iteration, unless a state within it was loaded.

        As in a DistributedSampler.
        """
        asked = self._starts.asked
        if asked is None or asked.first != epoch:
            self._starts.ask(Start(epoch, epoch))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        info = get_worker_info()
        if info is None:
            return self._begun()
        # Now, not at the first batch: every kept worker sees every iteration, in order.
        name = info.seed - info.id, self._iterations
        self._iterations += 1
        own, self._own = self._own, None
        start, number = self._starts.join(name, info.id, self._epochs, own)
        return self._read(self._begin(start, info.id, info.num_workers), number, [info.id, info.num_workers])

    def _begun(self) -> Iterator[dict[str, Tensor]]:
        """Counts the iteration at its first batch, because a StatefulDataLoader also makes iterators that it does not
        use.
        """
        start, number = self._starts.begin(self._epochs)
        yield from self._read(self._begin(start, 0, 1), number, [0, 1])

    def _begin(self, start: Start, worker: int, workers: int) -> BatchReader:
        """The reader of an iteration. From now on the state describes it."""
        several = start.workers > 1
        if several and (start.worker, start.workers) != (worker, workers):
            raise StateMismatch(
                f"the state is of worker {start.worker} of {start.workers}, this is {worker} of {workers}: resume "
                "with the same num_workers, or from the state of `store.batches`"
            )
        skip = workers - 1 if several else worker
        self._turn = [worker, workers] if several else None
        self._first, self._running, self._finished = start.first, True, False
        self._reader = self._open(start.first, (skip, workers), prefetch=get_worker_info() is None)
        self._reader.epoch, self._reader.consumed = start.epoch, start.consumed
        return self._reader

    def _read(self, reader: BatchReader, number: int, turn: list[int]) -> Iterator[dict[str, Tensor]]:
        epoch = reader.epoch
        try:
            for batch in reader:
                self._turn = turn
                if self._epochs is None and batch.epoch > epoch:
                    epoch = batch.epoch
                    self._starts.reached(number, epoch)
                yield _tensors(batch)
            self._finished = True
        finally:
            self._running = False
            reader.close()

    def state_dict(self) -> dict[str, Any]:
        """The state of this process (a worker, or the only process): the reader's state and its turn."""
        state = {**self._reader.state_dict(), "first_epoch": self._first, "turn": self._turn}
        asked = self._own or (None if self._running else self._starts.asked)
        if asked is not None:
            turn = [asked.worker, asked.workers] if asked.workers > 1 else None
            return state | {"epoch": asked.epoch, "consumed": asked.consumed, "first_epoch": asked.first, "turn": turn}
        return state | ({"finished": True} if self._finished else {})

    @checked()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration continues from this state, or from a state of `store.batches`. Raises StateMismatch.

        If the state is from the end of an iteration, the next iteration is the one after it.
        """
        self._reader.check(state)
        _check_turn(state)
        if state.get("turn") is not None and state["batch_size"] != self._batch_size:
            raise StateMismatch(
                f"the state is of one of several workers, with batch_size {state['batch_size']}, and here it is "
                f"{self._batch_size}: only the same batches can be shared in turns; resume with batch_size "
                f"{state['batch_size']}, or from the state of `store.batches`"
            )
        first, epoch, consumed = self._starts.next_epoch, int(state["epoch"]), int(state["consumed"])
        if epoch < first or (self._epochs is not None and epoch >= first + self._epochs):
            first = epoch  # a state of `store.batches`, in an epoch that this iteration would not reach
        first = int(state.get("first_epoch", first))
        start = Start(first, epoch, consumed, *(state.get("turn") or (0, 1)))
        if get_worker_info() is not None:
            self._own = start
        elif self._epochs is not None and self._is_finished(state, first):
            self._starts.ask(Start(first + self._epochs, first + self._epochs))
        else:
            self._starts.ask(start)

    def _is_finished(self, state: Mapping[str, Any], first: int) -> bool:
        if "turn" in state:
            return bool(state.get("finished"))
        left = self._stream.rows(int(state["epoch"])) - int(state["consumed"])
        none = left < (1 if self._options.get("last") == "keep" else self._batch_size)
        return none and int(state["epoch"]) == first + (self._epochs or 0) - 1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None, "_running": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reader = self._open()

    def _open(self, first_epoch: int = 0, turns: tuple[int, int] = (0, 1), prefetch: bool = True) -> BatchReader:
        epochs = None if self._epochs is None else first_epoch + self._epochs
        options: ReadOptions = {**self._options, "device": "cpu", "prefetch": prefetch}
        return BatchReader(self._stream, self._batch_size, epochs, turns=turns, **options)


def _check_turn(state: Mapping[str, Any]) -> None:
    """Raises WrongArgument for what a loader adds to a reader's state, where it cannot be."""
    if "first_epoch" in state:
        whole(0, int(state["epoch"]))("state['first_epoch']", state["first_epoch"])
    flag("state['finished']", state.get("finished", False))
    if (turn := state.get("turn")) is not None:
        pair = shape("state['turn']", turn)
        if len(pair) != 2 or not pair[0] < pair[1]:
            raise wrong("state['turn']", turn, "None, or [worker, workers] such as [0, 2]")


def _tensors(batch: Batch) -> dict[str, Tensor]:
    names = ("image", "noise", "label", "slot", "draw", "store")
    here = {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}
    return TensorBatch(here | batch.fields)
