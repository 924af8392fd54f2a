"""The order in which an epoch reads its records: a keyed bijection, so no permutation is ever stored.

A Feistel network (Luby and Rackoff, "How to construct pseudorandom permutations", 1988) permutes the smallest
power of two that holds 0..n-1; values that fall outside are permuted again until they fall inside (cycle
walking, Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), which takes fewer than two rounds
on average.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from nfm.storage.atomic import canonical_json, digest

Rows = npt.NDArray[np.int64]
_ROUNDS = 12
_CHUNK_RECORDS = 65536  # positions permuted at a time: the work of a call is shared, memory stays bounded


def order_key(source: str, rows: int, draws: int) -> str:
    """The identity of an order: the same for every coupling, codec and layout of the same source content."""
    return digest(canonical_json({"source": source, "rows": rows, "draws": draws}))


def permute(index: Rows, n: int, key: str | bytes) -> Rows:
    """Where the keyed bijection of 0..n-1 sends each value of `index`: int64, same shape."""
    index = np.asarray(index, np.int64)
    if index.size and (int(index.min()) < 0 or int(index.max()) >= n):
        raise IndexError(f"positions {int(index.min())}..{int(index.max())} are outside 0..{n - 1}")
    if n <= 1:
        return np.zeros_like(index)
    keys = _round_keys(key)
    bits = max(2, (n - 1).bit_length())
    values = _feistel(index.reshape(-1).astype(np.uint64), bits, keys)
    outside = np.flatnonzero(values >= n)
    while len(outside):
        values[outside] = _feistel(values[outside], bits, keys)
        outside = outside[values[outside] >= n]
    return values.astype(np.int64).reshape(index.shape)


def _round_keys(key: str | bytes) -> npt.NDArray[np.uint64]:
    data = key.encode() if isinstance(key, str) else key
    stream = hashlib.shake_256(data).digest(8 * _ROUNDS)
    return np.frombuffer(stream, "<u8").astype(np.uint64)


def _feistel(values: npt.NDArray[np.uint64], bits: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection of 0..2^bits-1; the halves differ by one bit when `bits` is odd."""
    widths = (bits // 2, bits - bits // 2)
    low = np.uint64(widths[0])
    masks = [np.uint64(2**width - 1) for width in widths]
    halves = [values & masks[0], values >> low]
    for number, key in enumerate(keys):
        side = number % 2
        halves[side] = halves[side] ^ (_mix(halves[1 - side] ^ key) & masks[side])
    return halves[1] << low | halves[0]


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): every bit of the result hangs on every bit
    of x.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute_windowed(index: Rows, n: int, rows_per_shard: int, window: int, key: str) -> Rows:
    """Like `permute`, but neighbours come from few files: shards are permuted, each `window` of them in a row
    form a window, and records are permuted inside it.
    """
    index = np.asarray(index, np.int64)
    shards = -(-n // rows_per_shard)
    shard_order = permute(np.arange(shards), shards, f"{key}:shards")
    records = np.minimum(rows_per_shard, n - shard_order * rows_per_shard)
    ends = np.cumsum(records)
    firsts = ends - records  # position at which each shard, in the new order, would start
    out = np.empty_like(index)
    window_of = np.searchsorted(ends, index, side="right") // window
    for number in np.unique(window_of):
        first, last = number * window, min((number + 1) * window, shards) - 1
        start, stop = int(firsts[first]), int(ends[last])
        here = window_of == number
        inside = start + permute(index[here] - start, stop - start, f"{key}:window:{number}")
        place = np.searchsorted(ends, inside, side="right")
        out[here] = shard_order[place] * rows_per_shard + inside - firsts[place]
    return out


@dataclass(frozen=True)
class Order:
    """All that decides which records a batch holds: a function of (order key, seed, epoch) alone."""

    key: str
    rows: int
    rows_per_shard: int
    seed: int
    batch_size: int  # of all ranks together
    shuffle: Literal["full", "windowed"] | None
    window: int
    last: Literal["drop", "keep"]

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: it must be at least 1")
        if self.shuffle not in ("full", "windowed", None):
            raise ValueError(f"shuffle is {self.shuffle!r}: it must be 'full', 'windowed' or None")
        if self.last not in ("drop", "keep"):
            raise ValueError(f"last is {self.last!r}: it must be 'drop' or 'keep'")
        if self.window < 1:
            raise ValueError(f"window is {self.window}: it must be at least 1 shard")

    @property
    def name(self) -> str:
        """What a reader's state must agree on to go on in the same order."""
        return f"windowed:{self.window}" if self.shuffle == "windowed" else self.shuffle or "none"

    def at(self, epoch: int, positions: Rows) -> Rows:
        """The rows that stand at these positions of the epoch."""
        key = f"{self.key}:{self.seed}:{epoch}"
        if self.shuffle == "full":
            return permute(positions, self.rows, key)
        if self.shuffle == "windowed":
            return permute_windowed(positions, self.rows, self.rows_per_shard, self.window, key)
        return positions

    def batches(self, epoch: int, consumed: int) -> Iterator[Rows]:
        """The epoch's global batches after `consumed` records, rows ascending within a batch.

        Sorted rows are gathered from the files in one pass and give each rank a few files only; which records
        make the batch does not change.
        """
        stop = self.rows
        if self.last == "drop":
            stop -= max(0, self.rows - consumed) % self.batch_size
        chunk = max(1, _CHUNK_RECORDS // self.batch_size) * self.batch_size
        for start in range(consumed, stop, chunk):
            rows = self.at(epoch, np.arange(start, min(start + chunk, stop), dtype=np.int64))
            for first in range(0, len(rows), self.batch_size):
                yield np.sort(rows[first : first + self.batch_size])
