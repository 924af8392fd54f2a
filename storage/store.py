"""The pair store as its readers see it: one generation, pinned at opening."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from nfm.storage import generations
from nfm.storage.atomic import read_json
from nfm.storage.batch import Arrays
from nfm.storage.errors import StorageError
from nfm.storage.index import read_index
from nfm.storage.order import Order, Rows
from nfm.storage.reader import BatchReader
from nfm.storage.schema import StoreSpec, read_spec
from nfm.storage.sequence import ShardSequence

_DRAWS_OPEN = 2  # a reader at the end of an epoch touches two draws


class PairStore:
    """(image, noise) pairs, `rows` of them a draw, mapped from shards; committed shards never change."""

    def __init__(self, root: Path, spec: StoreSpec, manifest: Mapping[str, Any]) -> None:
        self.root = root
        self.spec = spec
        self.manifest = manifest
        self.generation: int = manifest["generation"]
        self.draws: int = manifest["draws"]
        self.content_digest: str = manifest["content_digest"]
        self.order_key: str = manifest["order_key"]
        self.value_range = spec.value_range
        expected = generations.names_of(spec, self.draws)
        if [shard["name"] for shard in manifest["shards"]] != expected:
            raise StorageError(
                f"{generations.manifest_path(root, self.generation)}: does not list the {len(expected)} "
                f"shards of {self.draws} draws in order; run `nfm audit {root}`"
            )
        self._open: OrderedDict[int, ShardSequence] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path, generation: int | None = None) -> PairStore:
        """Opens a store at its newest generation, at the one given, or at the manifest that `path` names.

        Raises StorageError when there is no store or no sealed generation, NewerSchema. Shards are opened
        when they are read; a bad one raises MissingShard or CorruptShard then.
        """
        if "://" in str(path):
            raise StorageError(f"{path}: stores are read from local paths; copy the store here first")
        root = Path(path)
        if root.is_file():
            generation, root = int(read_json(root).get("generation", 0)), root.parent
        spec = read_spec(root)
        if generation is not None:
            return cls(root, spec, generations.load(root, generation))
        newest = generations.newest(root)
        if newest is None:
            raise StorageError(
                f"{root}: a pair store without a sealed generation; finish the pairs stage, or seal what is "
                f"complete with `nfm pairs seal {root}`"
            )
        return cls(root, spec, newest[1])

    def __len__(self) -> int:
        """Pairs of one draw."""
        return self.spec.rows

    def gather(self, draw: int, slots: Rows, out: Arrays | None = None) -> Arrays:
        """The pairs at these slots (any order, [n] integers) of a draw, as stored: arrays [n, *shape] by
        field.

        With `out`, only the fields in it, into its arrays.
        """
        names = [field.name for field in self.spec.fields] if out is None else list(out)
        return self._draw(draw).gather(names, slots, out)

    def index(self, columns: Sequence[str] | None = None, draw: int | None = None) -> pa.Table:
        """One row a record: key, slot, row, draw, flip, label, group, nll, or some of these; of one draw or
        all.
        """
        shards = self.manifest["shards"] if draw is None else self._shards_of(draw)
        return pa.concat_tables([read_index(self.root / shard["index"], columns) for shard in shards])

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = 1,
        *,
        shuffle: Literal["full", "windowed"] | None = "full",
        window: int = 16,
        last: Literal["drop", "keep"] = "drop",
        rank: int | None = None,
        world_size: int | None = None,
        device: Any = None,
        copy: bool = False,
        prefetch: bool = True,
    ) -> BatchReader:
        """Batches of float32 images and noise, read ahead by one thread; epoch e reads draw e mod `draws`.

        `batch_size` counts the records of all ranks. `epochs=None` never ends. `shuffle="windowed"` mixes
        `window` shards at a time, for stores larger than memory; None reads in the order of slots. Arrays are
        numpy's, or torch tensors on `device`. A batch is valid until the next one is asked for, unless
        `copy=True`.
        """
        order = Order(self.order_key, len(self), self.spec.rows_per_shard, seed, batch_size, shuffle, window, last)
        return BatchReader(
            self,
            order,
            epochs=epochs,
            rank=rank,
            world_size=world_size,
            device=device,
            copy=copy,
            prefetch=prefetch,
        )

    def draw(self, epoch: int) -> int:
        """The draw that an epoch reads."""
        return epoch % self.draws

    def empty(self, records: int) -> Arrays:
        """Buffers for the fields of a batch, to gather into."""
        names = [field.name for field in self.spec.fields if field.role != "slot"]
        return self._draw(0).empty(names, records)

    def _shards_of(self, draw: int) -> Sequence[Mapping[str, Any]]:
        if not 0 <= draw < self.draws:
            raise StorageError(
                f"{self.root}: draw {draw} is outside 0..{self.draws - 1} of generation {self.generation}"
            )
        each = self.spec.shards_per_draw
        return self.manifest["shards"][draw * each : (draw + 1) * each]

    def _draw(self, draw: int) -> ShardSequence:
        found = self._open.get(draw)
        if found is None:
            spec = self.spec
            files = [self.root / shard["payload"] for shard in self._shards_of(draw)]
            found = ShardSequence(files, spec.fields, spec.rows, spec.rows_per_shard, spec.rows_per_block)
            self._open[draw] = found
            while len(self._open) > _DRAWS_OPEN:
                self._open.popitem(last=False)
        return found
