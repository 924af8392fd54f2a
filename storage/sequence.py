"""The shards of one split or one draw, read as one array by row."""

from __future__ import annotations

import resource
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nfm.storage.schema import Field
from nfm.storage.tar import MappedShard

Array = npt.NDArray[Any]


class ShardSequence:
    """Rows 0..n-1 over files of `rows_per_shard` records each (the last may hold fewer).

    Files are mapped when first read. A map holds a file descriptor, so the ones unused for longest are closed
    beyond a quarter of the process's limit (`ulimit -n`).
    """

    def __init__(
        self,
        files: Sequence[Path],
        fields: Sequence[Field],
        rows: int,
        rows_per_shard: int,
        rows_per_block: int,
    ) -> None:
        self.files = list(files)
        self.fields = {field.name: field for field in fields}
        self.rows = rows
        self.rows_per_shard = rows_per_shard
        self._rows_per_block = rows_per_block
        self._maps: OrderedDict[int, MappedShard] = OrderedDict()
        self._most = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    def __len__(self) -> int:
        return self.rows

    def empty(self, names: Sequence[str], records: int) -> dict[str, Array]:
        """Arrays [records, *shape] in the stored dtypes, to gather into."""
        return {
            name: np.empty((records, *self.fields[name].shape), self.fields[name].dtype) for name in names
        }

    def gather(
        self, names: Sequence[str], rows: Array, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """The records at `rows` (any order, [n] integers) as arrays [n, *shape], in `out` if given.

        Raises IndexError for a row outside, MissingShard or CorruptShard (naming the file) for a bad file.
        """
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.rows):
            raise IndexError(f"rows {rows.min()}..{rows.max()} are outside 0..{self.rows - 1}")
        if np.any(rows[1:] < rows[:-1]):
            ascending = np.argsort(rows, kind="stable")
            sorted_arrays = self.gather(names, rows[ascending])
            result = dict(out) if out is not None else self.empty(names, len(rows))
            for name in names:
                result[name][ascending] = sorted_arrays[name]
            return result
        result = dict(out) if out is not None else self.empty(names, len(rows))
        shards = rows // self.rows_per_shard
        starts = np.flatnonzero(np.diff(shards, prepend=-1)).tolist()
        inside = rows - shards * self.rows_per_shard
        for start, stop in zip(starts, [*starts[1:], len(rows)]):
            shard = self.shard(int(shards[start]))
            for name in names:
                shard.gather(name, inside[start:stop], out=result[name][start:stop])
        return result

    def shard(self, number: int) -> MappedShard:
        """The mapped file of shard `number`."""
        found = self._maps.get(number)
        if found is None:
            records = min(self.rows_per_shard, self.rows - number * self.rows_per_shard)
            found = MappedShard(self.files[number], list(self.fields.values()), records, self._rows_per_block)
            self._maps[number] = found
            while len(self._maps) > self._most:
                self._maps.popitem(last=False)
        else:
            self._maps.move_to_end(number)
        return found
