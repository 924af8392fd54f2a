"""Compares the contents of a shard with its commit and its index part, and reads it again through stock readers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nfm.storage import layouts
from nfm.storage.format.index import INDEX_SCHEMA, keys_digest, read_index, record_keys
from nfm.storage.format.moments import MomentSums
from nfm.storage.format.spec import StoreSpec
from nfm.storage.layouts import Shard
from nfm.storage.ledger.commits import Commit

_ROWS = 1024  # records in memory at a time


def content_problems(spec: StoreSpec, commit: Commit, files: list[Path], index: Path, deep: bool) -> Iterator[str]:
    """Everything in files that contradicts their commit, though their bytes are the committed ones.

    It checks that every slot is there once and in order, keys and labels are equal in shard and index, noise is finite,
    and moments are as committed. With `deep` every record is also read by tarfile and numpy, or by zarr, and must be
    equal. Raises StorageError if a file cannot be opened.
    """
    slots = spec.slots_of(commit.shard)
    shard, table = layouts.open_shard(spec, files, len(slots)), read_index(index, records=len(slots))
    if not table.schema.equals(INDEX_SCHEMA) or any(column.null_count for column in table.columns):
        yield "its index part has not the columns of one, a value for each record"
        return
    own = np.arange(slots.start, slots.stop)
    stored = shard.read("slot", 0, len(slots)) if spec.has("slot") else own
    if not np.array_equal(stored, own):
        yield "its slots are not each there once, in order"
    if keys_digest(commit.draw, stored.tolist()) != commit.keys_digest:
        yield "the digest of its keys is not the committed one"
    if table["key"].to_pylist() != record_keys(commit.draw, slots) or not np.array_equal(table["slot"], own):
        yield "the keys of its index part are not its own"
    if spec.has("label") and not np.array_equal(shard.read("label", 0, len(slots)), table["label"]):
        yield "the labels of its index part are not its own"
    yield from _moment_problems(spec, shard, commit)
    if deep:
        yield from _stock_problems(spec, shard, commit, files)


def _moment_problems(spec: StoreSpec, shard: Shard, commit: Commit) -> Iterator[str]:
    sums = MomentSums()
    for start in range(0, shard.records, _ROWS):
        sums.add(shard.read("noise", start, min(start + _ROWS, shard.records)), spec.noise_step)
    if sums.nonfinite:
        yield f"{sums.nonfinite} values of the noise are not finite"
        return
    for name, value in sums.result().items():
        if not close(value, commit.moments.get(name)):
            yield f"{name} of the noise is {value}, {commit.moments.get(name)} was committed"


def close(value: float | None, stated: Any) -> bool:
    """Whether two moments are equal up to rounding, which depends on how the values were batched."""
    if value is None or not isinstance(stated, int | float):
        return value is stated
    return math.isclose(value, stated, rel_tol=1e-6, abs_tol=1e-7)


def _stock_problems(spec: StoreSpec, shard: Shard, commit: Commit, files: list[Path]) -> Iterator[str]:
    counts = dict.fromkeys((field.name for field in shard.fields), 0)
    try:
        for name, array in layouts.of(spec).stock_arrays(spec, files, commit.draw, commit.shard):
            start = counts[name]
            counts[name] += len(array)
            if counts[name] > shard.records:
                break
            mapped = shard.read(name, start, start + len(array))
            if mapped.dtype != array.dtype or not np.array_equal(mapped, array, equal_nan=mapped.dtype.kind == "f"):
                yield f"a stock reader finds other values in {name} from record {start} on"
                return
    except Exception as error:  # whatever the stock readers raise, it is about this shard
        yield f"a stock reader fails on it: {error}"
        return
    if set(counts.values()) != {shard.records}:
        yield f"a stock reader finds {counts} records, not {shard.records} of each field"
