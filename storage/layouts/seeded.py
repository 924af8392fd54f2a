"""Noise that is made when it is read, codec `seeded`: a shard keeps where the noise of each record comes from.

The noise of a record is what `philox.normals` draws for (the store's seed, a draw, a slot): float32, bit for bit that
of a store with codec float32. `noise_origin` has three numbers a record: the draw, the slot, and the crc32c of the
noise in little-endian bytes. So a reader sees if it ever makes other numbers, and stores of other seeds have other
contents.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from nfm.storage.errors import CorruptShard, StorageError
from nfm.storage.format import philox
from nfm.storage.format.codecs import CODECS
from nfm.storage.format.spec import StoreSpec

Array = npt.NDArray[Any]
_CHUNK = 1 << 17  # numbers made at a time: they are checked while they are in a core's second-level cache
_MOST_DRAWS = 1000
_AUDIT = "run `nfm audit` on its store"


class Made:
    """Makes the noise of a store's records from their origins."""

    def __init__(self, spec: StoreSpec) -> None:
        self.field = spec.field("noise")
        self._seed, self._rows = spec.seed, spec.rows
        self._size = math.prod(self.field.shape)

    @classmethod
    def of(cls, spec: StoreSpec) -> Made | None:
        """None for a store whose noise is stored."""
        return cls(spec) if CODECS[spec.codec].made else None

    def __call__(
        self, origins: Array, files: Sequence[Path], places: Array, which: Array | None = None, out: Array | None = None
    ) -> Array:
        """The noise of these origins, int64 [n, 3]: float32 [n, *shape], in `out` if given.

        Raises CorruptShard for an origin that no record has, and for noise of another check sum. It names the file:
        files[which[i]] for record i, or the only one, and the place in it: places[i]. The origin itself tells no place,
        because it may be what is damaged.
        """

        def said(row: int) -> str:
            file = files[0 if which is None else which[row]]
            return (
                f"{file}: record {places[row]} (from 0) says that its noise is of draw {draws[row]}, slot {slots[row]}"
            )

        out = np.empty((len(origins), *self.field.shape), np.float32) if out is None else out
        draws, slots = origins[:, 0], origins[:, 1]
        wrong = (draws < 0) | (draws >= _MOST_DRAWS) | (slots < 0) | (slots >= self._rows)
        if wrong.any():
            raise CorruptShard(f"{said(int(np.argmax(wrong)))}, which no record has; {_AUDIT}")
        flat = out.reshape(len(out), self._size)
        for start, stop, draw in _runs(draws, max(1, _CHUNK // self._size)):
            flat[start:stop] = drawn(self._seed, draw, slots[start:stop], self._size)
            for row in range(start, stop):
                if checksum(flat[row]) != origins[row, 2]:
                    raise CorruptShard(
                        f"{said(row)}, and the noise of that has not the check sum that was written; {_AUDIT}: if no "
                        "file is altered, numpy makes other numbers on this machine"
                    )
        return out


class Origins:
    """Finds where the noise of a shard's records comes from: the slot itself, or another slot of the shard."""

    def __init__(self, spec: StoreSpec, draw: int, shard: int) -> None:
        self._seed, self._draw, self._shard = spec.seed, draw, spec.slots_of(shard)
        self._size = math.prod(spec.field("noise").shape)
        self._slots: dict[bytes, int] | None = None  # by the digest of the noise; made when one is dealt elsewhere

    def __call__(self, slots: Array, noise: Array) -> Array:
        """The origins of float32 noise [n, *shape] at these slots: int64 [n, 3].

        Raises StorageError for noise that the seed draws for no slot of the shard.
        """
        flat = noise.reshape(len(noise), self._size)
        origins = np.empty((len(slots), 3), np.int64)
        rows = max(1, _CHUNK // self._size)
        for start in range(0, len(slots), rows):
            own = drawn(self._seed, self._draw, slots[start : start + rows], self._size)
            for row, (slot, made, given) in enumerate(zip(slots[start:].tolist(), own, flat[start:]), start):
                if made.tobytes() != given.tobytes():  # bytes, because -0 is not 0 here
                    slot = self._found(slot, given)
                origins[row] = self._draw, slot, checksum(given)
        return origins

    def _found(self, slot: int, noise: Array) -> int:
        if self._slots is None:
            every = np.arange(self._shard.start, self._shard.stop)
            step = max(1, _CHUNK // self._size)
            parts = (
                drawn(self._seed, self._draw, every[at : at + step], self._size) for at in every[::step] - every[0]
            )
            self._slots = dict(zip((_digest(row) for part in parts for row in part), self._shard))
        found = self._slots.get(_digest(noise))
        if found is None:
            raise StorageError(
                f"the noise of draw {self._draw}, slot {slot} is not, bit for bit, what seed {self._seed} draws for a "
                "slot of its shard, so codec seeded cannot make it again: something else made it, or the store rounded "
                "it (float16, int8); use codec float16 or float32, or make the store itself with codec seeded"
            )
        return found


def drawn(seed: int, draw: int, slots: Array, size: int) -> npt.NDArray[np.float32]:
    """The noises that a seed draws for these slots: float32 [n, size]."""
    return philox.normals(seed, draw, slots, size)


def checksum(noise: Array) -> int:
    """crc32c of the noise of a record, float32, in little-endian bytes."""
    return int(google_crc32c.value(noise.astype("<f4", copy=False)))


def _digest(noise: Array) -> bytes:
    return hashlib.blake2b(noise.tobytes(), digest_size=16).digest()


def _runs(draws: Array, most: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, draw) of consecutive records of one draw, at most `most` together."""
    edges = [0, *(np.flatnonzero(np.diff(draws)) + 1).tolist(), len(draws)]
    for first, last in pairwise(edges):
        for start in range(first, last, most):
            yield start, min(start + most, last), int(draws[start])
