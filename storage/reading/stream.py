"""The sequence of records that a reader reads, from one store or from several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from nfm.storage.format.order import Order, Rows, Shuffle, shard_counts
from nfm.storage.layouts import Shard
from nfm.storage.reading.selection import Selection

Arrays = dict[str, npt.NDArray[Any]]
_CHUNK_RECORDS = 65536  # positions permuted at a time: large enough to be fast, small enough to limit memory


class Joined(Protocol):
    """A field with one value for each source row, read by slot."""

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def gather(self, draw: int, slots: Rows, out: npt.NDArray[Any]) -> Any:
        """Fills `out` [n, *shape] with the values at these slots of a draw."""
        ...


class Source(Protocol):
    """Where records are stored: the draws of a pair store, or a split of a dataset as a single draw."""

    @property
    def order_key(self) -> str: ...

    @property
    def content_digest(self) -> str: ...

    @property
    def generation(self) -> int | None: ...

    @property
    def draws(self) -> int: ...

    @property
    def rows_per_shard(self) -> int: ...

    @property
    def value_range(self) -> tuple[float, float]:
        """The values of the uint8 pixels 0 and 255."""
        ...

    @property
    def noise_step(self) -> float | None:
        """The factor for integer noise."""
        ...

    def __len__(self) -> int:
        """The number of records of one draw."""
        ...

    def empty(self, records: int) -> Arrays:
        """Empty buffers for that many records, in the stored dtypes: image, and noise and label if there are any."""
        ...

    def gather(self, draw: int, rows: Rows, out: Arrays) -> Any:
        """Fills `out` with the records at these slots of a draw, as stored, or converted where `out` is float32."""
        ...

    @property
    def remote(self) -> bool:
        """Whether files are fetched before they are read."""
        ...

    def shard(self, draw: int, number: int) -> Shard:
        """A shard, mapped into memory; it is fetched first if needed."""
        ...

    def row_field(self, name: str) -> Joined:
        """A row-scoped field. Raises StorageError if there is none of this name."""
        ...


class Records(NamedTuple):
    """A list of records, int64 [n] each: member number (0 for a single store), draw, slot and epoch.

    The epoch is that of the member: a small member goes through several epochs during one epoch of the mixture.
    """

    store: Rows
    draw: Rows
    slot: Rows
    epoch: Rows

    def take(self, which: Any) -> Records:
        """Some of the records, by slice, mask or indices."""
        return Records(self.store[which], self.draw[which], self.slot[which], self.epoch[which])

    def runs(self) -> Iterator[tuple[int, int, slice]]:
        """(store, draw, where) of each run of consecutive records in the same draw and store."""
        same = (self.store[1:] == self.store[:-1]) & (self.draw[1:] == self.draw[:-1])
        edges = [0, *(np.flatnonzero(~same) + 1).tolist(), len(self.slot)]
        for start, stop in pairwise(edges):
            if start < stop:
                yield int(self.store[start]), int(self.draw[start]), slice(start, stop)


class Stream(Protocol):
    """The order of records for a whole training, and where they are stored."""

    @property
    def sources(self) -> Sequence[Source]:
        """The members, by number."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What two states must have in common so that one can continue this stream."""
        ...

    @property
    def lookahead(self) -> int:
        """How many positions ahead shards are brought in: one window. With 0, shards are not brought in ahead."""
        ...

    @property
    def least(self) -> int:
        """The number of records of the shortest epoch."""
        ...

    @property
    def most(self) -> int:
        """Records of the longest epoch."""
        ...

    @property
    def period(self) -> int:
        """After so many epochs, epochs have the same numbers of records again."""
        ...

    def rows(self, epoch: int) -> int:
        """The number of records of an epoch."""
        ...

    def at(self, epoch: int, positions: Rows) -> Records:
        """The records at these positions of an epoch."""
        ...


class StoreStream:
    """One source. Epoch e reads draw number e mod draws, or the selected records of the selected draws.

    `present` has the numbers of the existing shards, by draw; without it all exist. A selection refers to these.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        shuffle: Shuffle,
        window: int,
        selection: Selection | None = None,
        present: Mapping[int, Rows] | None = None,
    ) -> None:
        self.source = source
        self.sources = (source,)
        self.selection = selection
        self._present = present
        self.draws = tuple(range(source.draws)) if selection is None else selection.draws
        self.order_key = source.order_key if selection is None else selection.order_key(source.order_key)
        self.order = Order(self.order_key, seed, shuffle, window)
        ahead = source.remote or shuffle != "full"
        counts = [self._counts(draw) for draw in self.draws]
        # A window of more shards than a draw has is the whole draw.
        self.lookahead = max(min(window, len(each)) * int(each.max()) for each in counts) if ahead else 0
        records = [int(each.sum()) for each in counts]
        self.least, self.most = min(records), max(records)
        self._epoch: tuple[int, Callable[[Rows], Rows]] | None = None  # the one that was read last

    @property
    def identity(self) -> Mapping[str, Any]:
        return {
            "order_key": self.order_key,
            "content_digest": self.source.content_digest,
            "generation": self.source.generation,
            "filter": None if self.selection is None else self.selection.text,
            "weights": None,
            "seed": self.order.seed,
            "shuffle": self.order.name,
        }

    def draw(self, epoch: int) -> int:
        """The draw that an epoch reads."""
        return self.draws[epoch % len(self.draws)]

    @property
    def period(self) -> int:
        return len(self.draws)

    def rows(self, epoch: int) -> int:
        return int(self._counts(self.draw(epoch)).sum())

    def at(self, epoch: int, positions: Rows) -> Records:
        draw = self.draw(epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self.order.epoch(epoch, self._counts(draw))
        slots = self._epoch[1](positions)
        if self.selection is not None:
            slots = self.selection.slots[draw][slots].astype(np.int64)
        elif self._present is not None:  # all shards are full except the last, which no other follows
            number, inside = np.divmod(slots, self.source.rows_per_shard)
            slots = self._present[draw][number] * self.source.rows_per_shard + inside
        return Records(np.zeros_like(slots), np.full_like(slots, draw), slots, np.full_like(slots, epoch))

    def _counts(self, draw: int) -> Rows:
        if self.selection is not None:
            return self.selection.counts(draw, self.source.rows_per_shard)
        counts = shard_counts(len(self.source), self.source.rows_per_shard)
        return counts if self._present is None else counts[self._present[draw]]


@dataclass(frozen=True)
class Planned:
    """What one rank reads next, and the position of all ranks after it."""

    records: Records
    places: Rows  # of each of them in the batch of all ranks
    epoch: int
    consumed: int  # records of the epoch, over all ranks


def batches_in(stream: Stream, epochs: range, batch_size: int, drop_last: bool) -> int:
    """The number of batches of whole epochs. Of many epochs the first few tell it."""
    return sum(
        batches_of(stream.rows(epoch), batch_size, drop_last) * len(epochs[epoch - epochs.start :: stream.period])
        for epoch in epochs[: stream.period]
    )


def batches_of(records: int, batch_size: int, drop_last: bool) -> int:
    """The number of batches of so many records."""
    return records // batch_size if drop_last else -(-records // batch_size)


def plan(
    stream: Stream,
    batch_size: int,
    drop_last: bool,
    epochs: int | None,
    epoch: int,
    consumed: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Planned]:
    """The batches after `consumed` records of `epoch`, up to the end of the last epoch."""
    chunk = max(1, _CHUNK_RECORDS // batch_size) * batch_size
    while epochs is None or epoch < epochs:
        stop = stream.rows(epoch)
        if drop_last:
            stop -= max(0, stop - consumed) % batch_size
        for start in range(consumed, stop, chunk):
            records = stream.at(epoch, np.arange(start, min(start + chunk, stop), dtype=np.int64))
            for first in range(0, len(records.slot), batch_size):
                batch = records.take(slice(first, first + batch_size))
                consumed += len(batch.slot)
                yield Planned(*part_of(batch, rank, world_size), epoch, consumed)
        epoch, consumed = epoch + 1, 0


def part_of(batch: Records, rank: int, world_size: int) -> tuple[Records, Rows]:
    """The part of a rank, sorted by store, draw and slot, and the position of each record in the whole batch.

    Sorted records are gathered in one pass, from few files. In a mixture every rank gets its share of each member, up
    to one record.
    """
    batch = batch.take(np.lexsort((batch.slot, batch.draw, batch.store)))
    count = len(batch.slot)
    mine = np.arange(count * rank // world_size, count * (rank + 1) // world_size)
    if world_size == 1:
        return batch, mine
    if not count or batch.store[0] == batch.store[-1]:
        return batch.take(mine), mine
    _, first, of, sizes = np.unique(batch.store, return_index=True, return_inverse=True, return_counts=True)
    quantile = (np.arange(count) - first[of] + 0.5) / sizes[of]
    mine = np.sort(np.argsort(quantile, kind="stable")[mine])
    return batch.take(mine), mine
