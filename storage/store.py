"""The pair store as a reader sees it: one generation, fixed when the store is opened."""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nfm.storage import layouts
from nfm.storage.errors import NoPlace, StorageError, by, check_inside
from nfm.storage.errors.arguments import checked, or_none, some_of, whole
from nfm.storage.files.copies.cache import ShardCache, default_cache
from nfm.storage.files.paths import as_path, is_remote, store_named
from nfm.storage.format.index import INDEX_SCHEMA
from nfm.storage.format.order import Rows, Shuffle
from nfm.storage.format.spec import StoreSpec, read_spec
from nfm.storage.layouts.seeded import Made
from nfm.storage.ledger import seal
from nfm.storage.ledger.generation import DrawShards, Generation
from nfm.storage.ledger.row_fields import RowField
from nfm.storage.ledger.standing import UNSEALED, unsealed
from nfm.storage.reading.gathering.shards import ShardSequence
from nfm.storage.reading.reader import BatchReader, ReadOptions
from nfm.storage.reading.selection import Filter, read_parts, select
from nfm.storage.reading.stream import Arrays, StoreStream

if TYPE_CHECKING:
    from nfm.storage.reading.torch_dataset import TorchBatches

_DRAWS_OPEN = 2  # a reader at the end of an epoch uses two draws


class Readable(ABC):
    """Pairs that are read in batches: a store, or a mixture of stores."""

    @abstractmethod
    def stream(self, seed: int, shuffle: Shuffle, window: int, filter: Filter | None) -> Any:
        """The order of the records that a reader follows."""

    @checked(options=ReadOptions)
    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = 1,
        *,
        shuffle: Shuffle = "full",
        window: int = 16,
        filter: Filter | None = None,
        **options: Unpack[ReadOptions],
    ) -> BatchReader:
        """Batches of float32 images and noise [B, *shape]. Epoch e reads draw e modulo `draws`.

        `batch_size` counts the records of all ranks together. `epochs=None` never ends. `shuffle`: "full" mixes the
        whole draw; "windowed" mixes `window` shards at a time and reads the next ones ahead, for stores larger than
        memory; None keeps the order of the slots. `filter` keeps the records that match: a pyarrow expression over the
        columns of `index`, or a list of conditions such as [("label", "in", [1, 2])]. `ReadOptions` has the others.

        The filter of a mixture applies to every member.

        You may keep a batch as long as you like. Every call begins at epoch 0, so ask for all epochs in one call.
        Raises StorageError for a wrong argument, MissingShard or CorruptShard when a bad shard is reached.
        """
        return BatchReader(self.stream(seed, shuffle, window, filter), batch_size, epochs, **options)

    @checked(options=ReadOptions)
    def as_torch_dataset(
        self,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = 1,
        *,
        shuffle: Shuffle = "full",
        window: int = 16,
        filter: Filter | None = None,
        **options: Unpack[ReadOptions],
    ) -> TorchBatches:
        """The same batches as an IterableDataset: `DataLoader(dataset, batch_size=None, num_workers=any)`."""
        from nfm.storage.reading.torch_dataset import TorchBatches

        return TorchBatches(self.stream(seed, shuffle, window, filter), batch_size, epochs, **options)


class PairStore(Readable):
    """A store of (image, noise) pairs, open for reading. Every draw has `rows` pairs, one at each slot.

    Shards are mapped into memory, and committed shards never change. Any number of readers and threads may share an
    open store. A forked process may go on with it.
    """

    def __init__(self, sealed: Generation, cache: ShardCache | None = None) -> None:
        self.root, self.spec = sealed.root, sealed.spec
        spec = self.spec
        self.manifest = sealed.body
        self.generation, self.draws = sealed.number, sealed.draws
        self.content_digest, self.order_key = sealed.content_digest, sealed.order_key
        self.value_range = spec.value_range
        self.noise_step = spec.noise_step
        self.rows_per_shard = spec.rows_per_shard
        self.remote = is_remote(self.root)
        self.sealed = sealed.checked()
        self._cache = cache
        self._closed = False
        self._begin()
        _stores.add(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._evictions = 0  # the cache's count of evictions when evicted files were last closed
        self._open: OrderedDict[int, ShardSequence] = OrderedDict()
        self._rows: OrderedDict[int, Rows | None] = OrderedDict()

    @classmethod
    @checked()
    def open(cls, path: str | Path, generation: int | None = None, cache: ShardCache | None = None) -> PairStore:
        """Opens a store at its newest generation, at the one given, or at the manifest that `path` names.

        `path` is a folder, a URL that fsspec knows, or the beginning of a fingerprint that `nfm ls` shows, such as
        `3fa9c1`. Fingerprints are looked up under `NFM_ARTIFACTS`, or `artifacts/` in the current folder. The shards of
        a URL are fetched into `cache` when they are read (default: a cache of this process).

        Raises StorageError when there is no store or no sealed generation, and NewerSchema when a newer version of
        this package wrote it. Shards are opened when they are read: a bad one raises MissingShard or CorruptShard then.
        """
        root, named = seal.pinned(store_named(path))
        if named is not None:
            if generation not in (None, named):
                raise NoPlace(str(path), f"the manifest of generation {named}, not of {generation}; name the folder")
            generation = named
        spec = read_spec(root)
        if generation is not None:
            return cls(seal.load(root, generation, spec), cache)
        newest = seal.newest(root, spec)
        if newest is None:
            raise StorageError(f"{root}: {UNSEALED}; {unsealed(root)}")
        return cls(newest, cache)

    def __repr__(self) -> str:
        spec, named = self.spec, f"PairStore({str(self.root)!r}, generation={self.generation})"
        draws = f"{self.draws} draw{'s' * (self.draws != 1)}"
        return f"{named}: {draws} of {spec.rows:,} {spec.coupling} pairs, {by(spec.image_shape)}"

    def __enter__(self) -> PairStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the mapped shards. A later read raises StorageError; what its facts say stays."""
        self._closed = True
        with self._lock:
            self._open.clear()
            self._rows.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise StorageError(f"{self.root}: this store is closed; open it again with `PairStore.open`")

    def __reduce__(self) -> tuple[Callable[..., PairStore], tuple[Any, ...]]:
        return PairStore.open, (str(self.root), self.generation, self._cache)

    def __len__(self) -> int:
        """The number of slots of one draw. It counts pairs that this generation lacks, see `excluded`."""
        return self.spec.rows

    @property
    def excluded(self) -> Sequence[Mapping[str, Any]]:
        """The shards that this generation lacks: name, slots [first, after the last], records and reason of each."""
        return [hole.to_json() for hole in self.sealed.excluded]

    @checked()
    def slots(self, draw: int) -> Rows:
        """The slots that a draw has, ascending: int64 [n]. All of them, unless shards are excluded."""
        self._check_open()
        there = self.sealed.of(draw).numbers
        every = np.arange(len(self), dtype=np.int64)
        return every if there is None else every[np.isin(every // self.rows_per_shard, there)]

    @checked()
    def gather(self, draw: int, slots: Rows, out: Arrays | None = None) -> Arrays:
        """The pairs of a draw at these slots: arrays [n, *shape] by field name, as stored, in the order of `slots`.

        `slots` are integers [n] in any order. With `out`, only its fields are read, into its arrays; an image or noise
        array of float32 gets them converted, as in a batch. Raises WrongArgument for an unknown field or another
        array, OutOfRange for a slot that does not exist, MissingShard or CorruptShard if a shard is not what was
        committed.
        """
        names = [field.name for field in self.spec.fields] if out is None else list(out)
        return self._draw(draw).gather(names, slots, out)

    @checked(draw=whole(0, or_none="all"), columns=or_none(some_of(INDEX_SCHEMA.names)))
    def index(self, columns: Sequence[str] | None = None, draw: int | None = None) -> pa.Table:
        """The index as a table with one row for each record: key, slot, row, draw, flip, label, group, nll.

        `columns` selects some of these, `draw` one draw. The default is all.
        """
        self._check_open()
        return read_parts(self.root, self.sealed.shards if draw is None else self.sealed.of(draw).entries, columns)

    @checked()
    def image_rows(self, draw: int, slots: Rows) -> Rows:
        """The source rows of the images at these slots of a draw: integers [n], from the index."""
        self._check_open()
        with self._lock:
            if draw not in self._rows:
                self._rows[draw] = self._rows_of(draw)
                while len(self._rows) > _DRAWS_OPEN:
                    self._rows.popitem(last=False)
            rows = self._rows[draw]
        check_inside(f"{self.root}: slot", slots, len(self))
        if rows is None:
            return slots
        found = rows[slots]
        if len(found) and found.min() < 0:
            raise StorageError(f"{self.root}: some of these slots of draw {draw} are excluded; `slots` has the others")
        return found

    def _rows_of(self, draw: int) -> Rows | None:
        """The rows of all slots; None if each slot holds its own row, which most couplings do."""
        there = self.slots(draw)
        listed = read_parts(self.root, self.sealed.of(draw).entries, ["row"])["row"].to_numpy()
        if len(listed) != len(there):
            raise StorageError(f"{self.root}: the index of draw {draw} has {len(listed)} rows; run `nfm audit`")
        if np.array_equal(listed, there):
            return None
        rows = np.full(len(self), -1, np.int64)
        rows[there] = listed
        return rows

    @checked()
    def stream(self, seed: int, shuffle: Shuffle, window: int, filter: Filter | None) -> StoreStream:
        """The order of records that a reader or a mixture follows."""
        self._check_open()
        if self.remote:
            self._check_room(shuffle, window)
        selection = None
        if filter is not None:
            shards = {draw: self.sealed.of(draw).entries for draw in range(self.draws)}
            selection = select(self.root, shards, filter, len(self))
        return StoreStream(self, seed, shuffle, window, selection, self.sealed.numbers())

    @checked()
    def empty(self, records: int) -> Arrays:
        """Empty buffers for the fields of a batch, for `gather`."""
        names = [field.name for field in self.spec.fields if field.role != "slot"]
        return self._draw(0).empty(names, records)

    @checked()
    def shard(self, draw: int, number: int) -> layouts.Shard:
        """A shard of a draw, mapped into memory. If the store is a URL, it is fetched into the cache first."""
        check_inside(f"{self.root}: shard", np.array([number]), self.spec.shards_per_draw)
        if self.remote:  # before taking the draw's lock, so that several are fetched at once
            self.cache.together(self.root, layouts.files(self.spec, self.sealed.of(draw)[number]))
        return self._draw(draw).shard(number)

    @checked()
    def row_field(self, name: str) -> JoinedField:
        """A row-scoped field, joined by the image rows of slots. Raises StorageError if the store has no such field."""
        self._check_open()
        return JoinedField(self, RowField.open(self.root, name, self._cache))

    @property
    def cache(self) -> ShardCache:
        """The cache that keeps the shards of a URL on this machine."""
        return self._cache or default_cache()

    def _draw(self, draw: int) -> ShardSequence:
        self._check_open()
        with self._lock:
            found = self._open.pop(draw, None)
            if found is None:
                spec, shards = self.spec, self.sealed.of(draw)
                open_shard = partial(_open_shard, self.root, spec, shards, self.cache)
                found = ShardSequence(
                    open_shard,
                    spec.stored,
                    spec.rows,
                    spec.rows_per_shard,
                    spec.rows_per_block,
                    spec.layout,
                    spec.value_range,
                    spec.noise_step,
                    Made.of(spec),
                    what=f"{self.root}: slot",
                )
                while len(self._open) >= _DRAWS_OPEN:
                    self._open.popitem(last=False)
            self._open[draw] = found
            if self.remote and self.cache.evictions != self._evictions:
                self._evictions = self.cache.evictions
                for number, opened in self._open.items():
                    self._let_go_of_evicted(number, opened)
            return found

    def _let_go_of_evicted(self, draw: int, opened: ShardSequence) -> None:
        """Closes shards that the cache evicted: their disk space is free only when they are unmapped."""
        shards, cache = self.sealed.of(draw), self.cache
        opened.let_go(
            lambda number: not all(cache.holds(file.sha256) for file in layouts.files(self.spec, shards[number]))
        )

    def _check_room(self, shuffle: Shuffle, window: int) -> None:
        """Refuses a cache that is too small, which would fetch every shard again and again."""
        sizes = [self.sealed.of(draw).entries.numbers("bytes") for draw in range(self.draws)]
        bound = self.cache.max_bytes
        full, windows = max(int(each.sum()) for each in sizes), 2 * window * max(int(each.max()) for each in sizes)
        if shuffle == "full" and full > bound:
            raise StorageError(
                f"{self.root}: a draw of {full} bytes, shuffled in full, exceeds the cache's {bound}: pass "
                "shuffle='windowed', or raise NFM_CACHE_BYTES (NFM_CACHE names the folder)"
            )
        if shuffle == "windowed" and min(windows, full) > bound:
            raise StorageError(
                f"{self.root}: two windows of {window} shards, {windows} bytes, exceed the cache's {bound}: pass a "
                "smaller window, or raise NFM_CACHE_BYTES (NFM_CACHE names the folder)"
            )


def _open_shard(root: Path, spec: StoreSpec, shards: DrawShards, cache: ShardCache, number: int) -> layouts.Shard:
    # Not a method: otherwise it would keep an unused store and its maps alive.
    entry = shards[number]
    files = layouts.files(spec, entry)
    return cache.opened(root, files, lambda paths: layouts.open_shard(spec, paths, entry.records))


class JoinedField:
    """A row-scoped field of a store, read by slot."""

    def __init__(self, store: PairStore, field: RowField) -> None:
        self.dtype = field.dtype
        self.shape = field.shape
        self._store = store
        self._field = field

    def gather(self, draw: int, slots: Rows, out: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Fills `out` [n, *shape] with the values of the image rows at these slots."""
        return self._field.gather(self._store.image_rows(draw, np.asarray(slots, np.int64)), out)


_stores: weakref.WeakSet[PairStore] = weakref.WeakSet()


def _after_fork() -> None:
    """A child process has no threads: locks start free, and it makes its own connections."""
    for store in _stores:
        store._begin()
        if store.remote:
            store.root = as_path(str(store.root))


os.register_at_fork(after_in_child=_after_fork)
