"""A layout is one file and one line of the table: one that is added here works like those that came with us."""

from __future__ import annotations

import numpy as np
import pytest

from nfm.storage import PairStore, StorageError
from nfm.storage.export import export
from nfm.storage.layouts import LAYOUTS
from nfm.storage.layouts.tar_blocks import Blocks, MappedShard, ShardWriter, record_offsets, shard_bytes
from nfm.storage.verify import verify

ROWS = 4  # of a block, whatever the recipe says


class Tiny(Blocks):
    """Blocks of four records, and whole blocks only."""

    def writer(self, spec, path, name):
        return ShardWriter(path, spec.fields, len(spec.slots_of(int(name[-5:]))), name, ROWS)

    def mapped(self, spec, paths, records):
        return MappedShard(paths[0], spec.fields, records, ROWS)

    def offsets(self, fields, records, rows, rows_per_block):
        return record_offsets(fields, records, rows, ROWS)

    def shard_bytes(self, spec, records):
        return shard_bytes(spec.fields, records, ROWS)

    def check(self, spec):
        if spec.rows_per_shard % ROWS:
            raise StorageError(f"store spec: rows_per_shard {spec.rows_per_shard} is no multiple of {ROWS}")


def test_a_layout_of_the_table_is_written_read_checked_and_exported(make_store, spec_of, tmp_path, monkeypatch):
    with pytest.raises(StorageError, match="layout"):
        spec_of("tiny")
    monkeypatch.setitem(LAYOUTS, "tiny", Tiny())
    with pytest.raises(StorageError, match="multiple of 4"):
        spec_of("tiny", rows_per_shard=21)
    spec = spec_of("tiny")
    root = make_store(2, spec)
    shard = next((root / "shards").iterdir())
    assert shard.stat().st_size in {LAYOUTS["tiny"].shard_bytes(spec, records) for records in (20, 10)}
    assert verify(root, level="deep") == []
    slots = np.random.default_rng(0).permutation(50)
    pairs = PairStore.open(root).gather(1, slots)
    np.testing.assert_array_equal(pairs["slot"], slots)
    export(PairStore.open(root), tmp_path / "zarr", "zarr", "float16")
    export(PairStore.open(tmp_path / "zarr"), tmp_path / "back", "tiny", "float16")
    assert PairStore.open(tmp_path / "back").content_digest == PairStore.open(root).content_digest
    for name, values in PairStore.open(tmp_path / "back").gather(1, slots).items():
        np.testing.assert_array_equal(values, pairs[name])
