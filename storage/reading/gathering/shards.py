"""Reads the shards of one split or one draw as one array of rows."""

from __future__ import annotations

import ctypes
import math
import os
import resource
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from nfm.storage.errors import CorruptShard, check_inside
from nfm.storage.errors.arguments import some_of, writable
from nfm.storage.format.convert import linear, to_float32
from nfm.storage.format.fields import ORIGIN, Field
from nfm.storage.layouts import LAYOUTS, Shard
from nfm.storage.layouts.seeded import Made
from nfm.storage.reading.gathering.compiled import loops

Array = npt.NDArray[Any]
_STAGED = 1 << 18  # numbers gathered before they are converted: half a MiB of float16, in a core's second-level cache
_LARGE_RECORD = 4096  # bytes; from here on one copy for each record is faster than numpy's gather, which copies twice


class ShardSequence:
    """Rows 0..n-1 over shards of `rows_per_shard` records each (the last may hold fewer).

    `open_shard(number)` opens a shard; it is called when the shard is first read. `what` is a row in messages. Each map
    holds a file descriptor. Beyond a quarter of the process's limit (`ulimit -n`), the least recently used are closed.
    uint8 images are converted to `value_range`, and integer noise by `noise_step`, as `to_float32` does. `fields` are
    the stored ones; noise that is not among them is `made`.
    """

    def __init__(
        self,
        open_shard: Callable[[int], Shard],
        fields: Sequence[Field],
        rows: int,
        rows_per_shard: int,
        rows_per_block: int,
        layout: str = "blocks",
        value_range: tuple[float, float] = (-1.0, 1.0),
        noise_step: float | None = None,
        made: Made | None = None,
        what: str = "row",
    ) -> None:
        self.what = what
        self.stored = {field.name: field for field in fields}
        self.fields = self.stored | ({} if made is None else {"noise": made.field})
        self._writes = {name: _writes(field) for name, field in self.fields.items()}
        self._made = made
        self.rows = rows
        self.rows_per_shard = rows_per_shard
        self.rows_per_block = rows_per_block
        self.layout = layout
        self._value_range, self._noise_step = value_range, noise_step
        self._open_shard = open_shard
        files = len(self.stored) if LAYOUTS[layout].by_field else 1
        self._most = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4 // files)
        self._begin()
        _sequences.add(self)

    def _begin(self) -> None:
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.rows

    def empty(self, names: Sequence[str], records: int) -> dict[str, Array]:
        """Empty arrays [records, *shape] in the stored dtypes, for `gather`."""
        return {name: np.empty((records, *self.fields[name].shape), self.fields[name].dtype) for name in names}

    def gather(self, names: Sequence[str], rows: Array, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """The records at `rows` ([n] integers, in any order) as arrays [n, *shape], in `out` if given.

        An array of `out` has the stored dtype. For images and noise it may be float32; then they are converted. Raises
        WrongArgument for another array or an unknown field, OutOfRange for a row that does not exist, MissingShard or
        CorruptShard (naming the file) for a bad file.
        """
        rows = np.asarray(rows, np.int64)
        result = self.empty(names, len(rows)) if out is None else self._checked(out, len(rows))
        if not len(rows):
            return result
        check_inside(self.what, rows, self.rows)
        number, inside = np.divmod(rows, self.rows_per_shard)
        touched = sorted(set(number.tolist()))
        which = np.searchsorted(touched, number)
        held = [self.shard(shard) for shard in touched]
        layout = LAYOUTS[self.layout]
        records = np.minimum(self.rows - number * self.rows_per_shard, self.rows_per_shard)
        offsets = layout.offsets(list(self.stored.values()), records, inside, self.rows_per_block)
        for name in names:
            made = self._made if name == "noise" else None
            stored = name if made is None else ORIGIN
            if stored not in offsets:  # it follows from the position
                result[name][...] = rows
                continue
            starts = np.array([shard.addresses[stored] for shard in held], np.int64)[which] + offsets[stored]
            if made is not None:
                origins = np.empty((len(rows), *self.stored[ORIGIN].shape), np.int64)
                _Records(starts, self.stored[ORIGIN].bytes_per_record).copy(0, origins)
                made(origins, [shard.file_of(ORIGIN) for shard in held], inside, which, result[name])
            elif (text := layout.text(name)) is not None:
                written = np.empty((len(rows), text.bytes), np.uint8)
                _Records(starts, text.bytes).copy(0, written)
                result[name][...] = text.parse(written)
            else:
                self._fill(name, starts, result[name])
        del held  # until here, all shards that are read must stay mapped
        return result

    def _fill(self, name: str, starts: Array, out: Array) -> None:
        """Fills `out` with the numbers that lie at `starts`, as they are stored or as float32."""
        field, flat = self.fields[name], out.reshape(len(out), -1)
        as_stored = out.dtype == field.dtype
        loop = loops.loop("bytes" if as_stored else field.dtype, out.nbytes)
        step = self._noise_step if name == "noise" else None
        if loop is not None and as_stored:
            loop(starts, flat.view(np.uint8), 1.0, 0.0)
        elif loop is not None:
            loop(starts, flat, *linear(np.dtype(field.dtype), self._value_range, step))
        elif as_stored:
            _Records(starts, field.bytes_per_record).copy(0, out)
        else:
            self._convert(field, starts, out, step)

    def _convert(self, field: Field, starts: Array, out: Array, step: float | None) -> None:
        """Fills float32 `out` some records at a time, which are converted while they are in the core's cache.

        Fewer at a time would cost more calls than they save in memory. torch is the faster converter, if the process
        has it.
        """
        torch = "torch" in sys.modules
        some = max(1, _STAGED // math.prod(field.shape))
        stored = np.empty((min(some, len(out)), *field.shape), field.dtype)
        records = _Records(starts, field.bytes_per_record)
        for first in range(0, len(out), some):
            target = out[first : first + some]
            part = stored[: len(target)]
            records.copy(first, part)
            to_float32(part, self._value_range, target, step, torch=torch)

    def _checked(self, out: Mapping[str, Array], records: int) -> dict[str, Array]:
        if not out.keys() <= self.fields.keys():
            some_of(list(self.fields))("out", out.keys())
        for name, array in out.items():
            writable(f"out[{name!r}]", array, (records, *self.fields[name].shape), self._writes[name])
        return dict(out)

    def shard(self, number: int) -> Shard:
        """Shard `number`, open."""
        with self._lock:
            found = self._open.pop(number, None)
            if found is None:
                found = self._opened(number)
                while len(self._open) >= self._most:
                    self._open.popitem(last=False)
            self._open[number] = found
            return found

    def let_go(self, unwanted: Callable[[int], bool]) -> None:
        """Closes the shards whose number is unwanted. A running gather keeps its own open."""
        with self._lock:
            for number in [number for number in self._open if unwanted(number)]:
                del self._open[number]

    def _opened(self, number: int) -> Shard:
        found, records = self._open_shard(number), min(self.rows_per_shard, self.rows - number * self.rows_per_shard)
        if found.records != records:  # otherwise offsets would point outside its map
            raise CorruptShard(f"shard {number} is listed with {found.records} records, its rows are {records}")
        return found


def _writes(field: Field) -> list[np.dtype[Any]]:
    """The types in which a field may be gathered."""
    kinds = [field.dtype, "float32"] if field.name in ("image", "noise") else [field.dtype]
    return [np.dtype(kind) for kind in dict.fromkeys(kinds)]


class _Records:
    """Records of `size` bytes that begin at the addresses `starts`.

    The shards are separate maps in one address space. One strided view covers the space from the lowest address, with a
    step of one byte. So a batch is a single gather, however many shards it touches; one call for each shard costs five
    times as much at 60 shards. Only addresses inside shards that the caller holds are read.
    """

    def __init__(self, starts: Array, size: int) -> None:
        lowest = int(starts.min())
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(lowest))
        self._window = as_strided(memory, (int(starts.max()) - lowest + 1, size), (1, 1), writeable=False)
        self._size, self._starts = size, starts - lowest

    def copy(self, first: int, out: Array) -> None:
        """Fills `out` [n, ...] with the bytes of records first to first + n."""
        target = out.reshape(len(out), -1).view(np.uint8)
        starts = self._starts[first : first + len(out)]
        if self._size < _LARGE_RECORD:
            target[...] = self._window[starts]
        else:
            for row, start in enumerate(starts.tolist()):
                target[row] = self._window[start]


_sequences: weakref.WeakSet[ShardSequence] = weakref.WeakSet()


def _after_fork() -> None:
    """A child process has no threads: a lock that a thread of the parent held would never be released."""
    for sequence in _sequences:
        sequence._begin()


os.register_at_fork(after_in_child=_after_fork)
