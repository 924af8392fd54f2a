"""A reader inside torch's DataLoader, for those who have one: workers take turns over the batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from nfm.storage.batch import Batch
from nfm.storage.errors import StateMismatch
from nfm.storage.ranks import find_rank
from nfm.storage.reader import BatchReader, ReadOptions
from nfm.storage.stream import Stream


class TorchBatches(IterableDataset[dict[str, Tensor]]):
    """Batches as dicts of CPU tensors: image, noise, label, slot, draw, store, and the fields asked for.

    Batches are whole, so pass `batch_size=None` to the DataLoader. With any number of workers its order is that of
    the reader; the rank is that of the process that makes the dataset. Every iteration reads `epochs` epochs, the
    first one being epoch 0 or the one last given to `set_epoch`; after `load_state_dict` it goes on from there (with
    workers, until `set_epoch` names another epoch). Under torchdata's StatefulDataLoader the state is exact.

    Workers copy every batch through shared memory, which costs many times what reading it does: iterate over
    `store.batches(device=...)` itself where you can. Of a store at a URL every worker has a cache of its own, unless
    the store is opened with `cache=ShardCache(folder)`.
    """

    def __init__(self, stream: Stream, batch_size: int, epochs: int | None = 1, **options: Unpack[ReadOptions]) -> None:
        super().__init__()
        for name in ("device", "copy", "prefetch"):
            if name in options:
                raise ValueError(f"{name}: a DataLoader gets copies as CPU tensors; use `batches` without a loader")
        self._stream = stream
        self._batch_size = batch_size
        self._epochs = epochs
        rank, world_size = find_rank(options.get("rank"), options.get("world_size"))
        self._options: ReadOptions = {**options, "rank": rank, "world_size": world_size}
        self._first_epoch = torch.tensor(0).share_memory_()  # workers that persist see it change
        self._loaded: Mapping[str, Any] | None = None
        self._turn: list[int] | None = None  # [worker, workers] once this process has yielded a batch
        self._first = 0  # the epoch with which the present iteration began
        self._reader = self._open()  # so that wrong options are errors here, not in a worker

    def __len__(self) -> int:
        """Batches of one iteration from its beginning. Raises TypeError when it never ends."""
        if self._epochs is None:
            raise TypeError("batches without end have no length: pass epochs=")
        first, each = int(self._first_epoch), self._batch_size
        rows = [self._stream.rows(epoch) for epoch in range(first, first + self._epochs)]
        return sum(-(-n // each) if self._options.get("last") == "keep" else n // each for n in rows)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration begins with, unless a loaded state is in it; as of a DistributedSampler."""
        self._first_epoch.fill_(epoch)
        if self._loaded is not None and self._loaded.get("first_epoch", epoch) != epoch:
            self._loaded = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        state, self._loaded = self._loaded, None
        self._turn = None if state is None else state.get("turn")
        if self._turn is not None and self._turn != [worker, workers]:
            raise StateMismatch(
                f"the state is of worker {self._turn[0]} of {self._turn[1]}, this is {worker} of {workers}: resume "
                "with the same num_workers, or from the state of `store.batches`"
            )
        self._first = int(self._first_epoch) if state is None else state.get("first_epoch", 0)
        skip = worker if self._turn is None else workers - 1
        reader = self._reader = self._open(self._first, (skip, workers), prefetch=info is None)
        if state is not None:
            reader.load_state_dict(state)
        try:
            for batch in reader:
                self._turn = [worker, workers]
                yield _tensors(batch)
        finally:
            reader.close()

    def state_dict(self) -> dict[str, Any]:
        """Where this process stands, a worker or the only one: the reader's state, and whose turns it counts."""
        if self._loaded is not None:
            return dict(self._loaded)
        return {**self._reader.state_dict(), "first_epoch": self._first, "turn": self._turn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on from this state, or from one of `store.batches`. Raises StateMismatch."""
        self._open().load_state_dict(state)
        first, epoch = int(self._first_epoch), int(state["epoch"])
        if epoch < first or (self._epochs is not None and epoch >= first + self._epochs):
            first = epoch  # a state of `store.batches`, in an epoch that this iteration would not reach
        self._loaded = {"first_epoch": first, **state}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reader = self._open()

    def _open(self, first_epoch: int = 0, turns: tuple[int, int] = (0, 1), prefetch: bool = True) -> BatchReader:
        epochs = None if self._epochs is None else first_epoch + self._epochs
        options: ReadOptions = {**self._options, "device": "cpu", "copy": True, "prefetch": prefetch}
        reader = BatchReader(self._stream, self._batch_size, epochs, turns=turns, **options)
        reader.epoch = first_epoch
        return reader


def _tensors(batch: Batch) -> dict[str, Tensor]:
    names = ("image", "noise", "label", "slot", "draw", "store")
    return {name: getattr(batch, name) for name in names if getattr(batch, name) is not None} | batch.fields
