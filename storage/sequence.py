"""The shards of one split or one draw, read as one array by row."""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from nfm.storage.schema import Field
from nfm.storage.tar import MappedShard, record_offsets

Array = npt.NDArray[Any]
_LARGE_RECORD = 4096  # bytes; from here on a copy a record beats numpy's gather, which copies twice


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
        self.rows_per_block = rows_per_block
        self._maps: OrderedDict[int, MappedShard] = OrderedDict()
        self._most = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.rows

    def empty(self, names: Sequence[str], records: int) -> dict[str, Array]:
        """Arrays [records, *shape] in the stored dtypes, to gather into."""
        return {name: np.empty((records, *self.fields[name].shape), self.fields[name].dtype) for name in names}

    def gather(self, names: Sequence[str], rows: Array, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """The records at `rows` (any order, [n] integers) as arrays [n, *shape], in `out` if given.

        Raises IndexError for a row outside, MissingShard or CorruptShard (naming the file) for a bad file.
        """
        rows = np.asarray(rows, np.int64)
        result = dict(out) if out is not None else self.empty(names, len(rows))
        if not len(rows):
            return result
        if rows.min() < 0 or rows.max() >= self.rows:
            raise IndexError(f"rows {rows.min()}..{rows.max()} are outside 0..{self.rows - 1}")
        number = rows // self.rows_per_shard
        touched, which = np.unique(number, return_inverse=True)
        held = [self.shard(shard) for shard in touched.tolist()]
        addresses = np.array([shard.address for shard in held])
        first = int(np.argmin(addresses))
        start = (addresses - addresses[first])[which]
        inside = rows - number * self.rows_per_shard
        records = np.minimum(self.rows - number * self.rows_per_shard, self.rows_per_shard)
        offsets = record_offsets(list(self.fields.values()), records, inside, self.rows_per_block)
        for name in names:
            self._check(name, result[name], len(rows))
            _gather(held[first].memory, start + offsets[name], result[name])
        del held  # until here: what is gathered from must stay mapped
        return result

    def _check(self, name: str, out: Array, records: int) -> None:
        field = self.fields[name]
        shape = (records, *field.shape)
        if out.shape != shape or out.dtype != np.dtype(field.dtype) or not out.flags.c_contiguous:
            raise ValueError(f"out[{name!r}] is {out.dtype} {out.shape}: pass a contiguous {field.dtype} {shape}")

    def shard(self, number: int) -> MappedShard:
        """The mapped file of shard `number`."""
        with self._lock:
            found = self._maps.pop(number, None)
            if found is None:
                records = min(self.rows_per_shard, self.rows - number * self.rows_per_shard)
                fields = list(self.fields.values())
                found = MappedShard(self.files[number], fields, records, self.rows_per_block)
                while len(self._maps) >= self._most:
                    self._maps.popitem(last=False)
            self._maps[number] = found
            return found


def _gather(memory: Array, starts: Array, out: Array) -> None:
    """Fills the rows of `out` with the bytes that begin at `starts`, counted from where `memory` begins.

    The shards are separate maps of one address space. Reading them through one window that slides by a byte,
    from the lowest map up, makes a batch one gather, however many shards it touches (a call a shard costs
    five times as much at 60 shards). Only addresses of records of shards that the caller holds are ever
    touched.
    """
    size = out.nbytes // len(out)
    target = out.reshape(len(out), -1).view(np.uint8)
    window = as_strided(memory, (int(starts.max()) + 1, size), (1, 1), writeable=False)
    if size < _LARGE_RECORD:
        target[...] = window[starts]
    else:
        for row, start in enumerate(starts.tolist()):
            target[row] = window[start]
