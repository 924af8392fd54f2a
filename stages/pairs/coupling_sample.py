"""The records for a coupling report: a limited, seeded sample from a limited number of shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nfm.stages.couplings.rows import slot_is_row
from nfm.storage import PairStore
from nfm.storage.format import codecs, convert
from nfm.storage.format.spec import parse_name
from nfm.storage.reading.selection import read_parts

PAIRS, SHARDS = 20_000, 64
VALUES = 1 << 26  # of all noise: 256 MiB of float32
PARTS_COUNTED = 2048  # index parts that are read to count rows


@dataclass(frozen=True)
class Sample:
    """n records: image and noise float32 [n, D]; label int64 [n], -1 for none; nll [n], nan for none."""

    image: np.ndarray
    noise: np.ndarray
    label: np.ndarray
    nll: np.ndarray
    shards: int


def draw_sample(store: PairStore, seed: int) -> Sample:
    """At most 20,000 pairs from at most 64 shards, each slot at most once.

    If an image came twice, with the similar noises of two draws, a classifier could recognise held-out records from
    those that it was trained on.
    """
    random = np.random.default_rng(seed)
    size = int(np.prod(store.spec.image_shape))
    shards = _shards(store, random)
    ends = np.cumsum([entry["records"] for _, _, entry in shards])
    count = min(PAIRS, max(1, VALUES // size), int(ends[-1]))
    picked = np.sort(random.choice(ends[-1], count, replace=False))
    own = np.split(picked, np.searchsorted(picked, ends))  # with an empty part after the last end
    parts = [
        _of_shard(store, draw, shard, entry, places - (end - entry["records"]))
        for (draw, shard, entry), end, places in zip(shards, ends.tolist(), own)
        if len(places)
    ]
    image, noise, label, nll = (np.concatenate(part) for part in zip(*parts))
    return Sample(image, noise, label, nll, len(parts))


def _shards(store: PairStore, random: np.random.Generator) -> list[tuple[int, int, Any]]:
    """(draw, number, entry) of shards with different slots, by draw."""
    entries, found = store.manifest["shards"], dict[int, tuple[int, int, Any]]()
    for at in random.permutation(len(entries)).tolist():
        entry = entries[at]
        draw, shard = parse_name(entry["name"])
        found.setdefault(shard, (draw, shard, entry))
        if len(found) == min(SHARDS, store.spec.shards_per_draw):
            break
    return sorted(found.values(), key=lambda shard: shard[:2])


def _of_shard(
    store: PairStore, draw: int, shard: int, entry: Any, at: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Image, noise, label and nll of these records of a shard."""
    stored = store.gather(draw, at + store.spec.slots_of(shard).start)
    index = read_parts(store.root, [entry], ["label", "nll"])
    image = convert.to_float32(stored["image"], store.value_range).reshape(len(at), -1)
    noise = codecs.unpack(stored["noise"], store.noise_step).reshape(len(at), -1)
    nll = index["nll"].to_numpy()[at].astype(np.float64)
    return image, noise, index["label"].to_numpy()[at].astype(np.int64), nll


def row_counts(store: PairStore, seed: int) -> tuple[np.ndarray, bool]:
    """(how often each source row is paired, int64 [rows]; whether all pairs were counted).

    Couplings that use each row once in a draw need no reading: what the generation lacks is known. For others the index
    is read; for very large stores a seeded part of it.
    """
    rows, draws = store.spec.rows, store.draws
    if slot_is_row(store.spec):
        counts = np.full(rows, draws, np.int64)
        for hole in store.excluded:
            counts[slice(*hole["slots"])] -= 1
        return counts, True
    entries = store.manifest["shards"]
    whole = len(entries) <= PARTS_COUNTED
    if not whole:
        picked = np.random.default_rng(seed).choice(len(entries), PARTS_COUNTED, replace=False)
        entries = [entries[at] for at in np.sort(picked).tolist()]
    listed = read_parts(store.root, entries, ["row"])["row"].to_numpy()
    return np.bincount(listed, minlength=rows).astype(np.int64), whole
