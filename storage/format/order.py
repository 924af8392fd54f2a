"""The order in which an epoch reads its records: a keyed bijection, so that no permutation is stored.

A Feistel network (Luby and Rackoff, "How to construct pseudorandom permutations", 1988) permutes the smallest power of
two that holds 0..n-1. Results outside 0..n-1 are permuted again until they fall inside (cycle walking: Black and
Rogaway, "Ciphers with arbitrary finite domains", 2002). This takes fewer than two rounds on average.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nfm.storage.errors import check_inside
from nfm.storage.errors.arguments import RULES
from nfm.storage.files.atomic import canonical_json, digest

Rows = npt.NDArray[np.int64]
Shuffle = Literal["full", "windowed"] | None
_ROUNDS = 12


def order_key(source: str, rows: int, draws: int, excluded: Sequence[Sequence[int]] = ()) -> str:
    """The identity of an order: the same for every coupling, codec and layout of the same source content.

    `excluded` lists the missing slots as (draw, first, after the last).
    """
    body: dict[str, Any] = {"source": source, "rows": rows, "draws": draws}
    return digest(canonical_json(body | ({"excluded": [list(slots) for slots in excluded]} if excluded else {})))


def permute(index: Rows, n: int, key: str | bytes) -> Rows:
    """The images of `index` under the keyed bijection of 0..n-1: int64, same shape."""
    index = np.asarray(index, np.int64)
    check_inside("position", index, n)
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
    """A bijection of 0..2^bits-1. If `bits` is odd, the halves differ by one bit."""
    widths = (bits // 2, bits - bits // 2)
    low = np.uint64(widths[0])
    masks = [np.uint64(2**width - 1) for width in widths]
    halves = [values & masks[0], values >> low]
    for number, key in enumerate(keys):
        side = number % 2
        halves[side] = halves[side] ^ (_mix(halves[1 - side] ^ key) & masks[side])
    return halves[1] << low | halves[0]


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The final step of splitmix64 (Steele, Lea and Flood, 2014): every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Windows:
    """One epoch of windowed order: like `permute`, but neighbours come from few files.

    The shards, with `counts` records each, are permuted. Every `size` consecutive shards form a window, and records are
    permuted inside it.
    """

    def __init__(self, counts: Rows, size: int, key: str) -> None:
        self._size = size
        self._key = key
        self._shards = permute(np.arange(len(counts)), len(counts), f"{key}:shards")
        self._ends = np.cumsum(counts[self._shards])
        # the position at which each shard, in the new order, would start
        self._firsts = self._ends - counts[self._shards]
        self._numbers = (np.cumsum(counts) - counts)[self._shards]  # the number of the first record of each

    def __call__(self, positions: Rows) -> Rows:
        """The numbers of the records at these positions, counted through the shards in their stored order."""
        positions = np.asarray(positions, np.int64)
        out = np.empty_like(positions)
        window_of = np.searchsorted(self._ends, positions, side="right") // self._size
        for number in np.unique(window_of):
            first, last = number * self._size, min((number + 1) * self._size, len(self._ends)) - 1
            start, stop = int(self._firsts[first]), int(self._ends[last])
            here = window_of == number
            inside = start + permute(positions[here] - start, stop - start, f"{self._key}:window:{number}")
            place = np.searchsorted(self._ends, inside, side="right")
            out[here] = self._numbers[place] + inside - self._firsts[place]
        return out


def shard_counts(rows: int, rows_per_shard: int) -> Rows:
    """The number of records of each shard. All but the last are full."""
    starts = np.arange(0, rows, rows_per_shard, dtype=np.int64)
    return np.minimum(rows - starts, rows_per_shard)


@dataclass(frozen=True)
class Order:
    """How the records of an epoch are mixed: a function of (order key, seed, epoch) only."""

    key: str
    seed: int = 0
    shuffle: Shuffle = "full"
    window: int = 16  # shards that windowed order mixes at a time

    def __post_init__(self) -> None:
        for name in ("seed", "shuffle", "window"):
            object.__setattr__(self, name, RULES[name](name, getattr(self, name)))

    @property
    def name(self) -> str:
        """A text that a reader's state stores. Two readers with the same text read in the same order."""
        return f"windowed:{self.window}" if self.shuffle == "windowed" else self.shuffle or "none"

    def epoch(self, epoch: int, counts: Rows) -> Callable[[Rows], Rows]:
        """A function from positions in an epoch to the records at these positions; the shards have `counts` records.

        Both are int64 arrays of the same shape. Records are numbered through the shards in order.
        """
        key = f"{self.key}:{self.seed}:{epoch}"
        if self.shuffle == "full":
            return partial(permute, n=int(counts.sum()), key=key)
        if self.shuffle == "windowed":
            return Windows(counts, self.window, key)
        return np.asarray
