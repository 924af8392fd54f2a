"""A pair store reads back what was committed, through our reader and through stock ones."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nfm.storage import (
    CorruptShard,
    MissingShard,
    NewerSchema,
    PairStore,
    StateMismatch,
    StorageError,
    generations,
)
from nfm.storage.schema import StoreSpec, pair_fields
from nfm.storage.sequence import ShardSequence


def noise_of(spec: StoreSpec, draw: int, slots) -> np.ndarray:
    values = [np.random.default_rng((draw, slot)).normal(size=spec.image_shape) for slot in slots]
    return np.stack(values).astype(np.float32).astype(spec.codec)


def test_every_slot_of_every_draw_reads_back_in_any_order(make_store, small_spec):
    store = PairStore.open(make_store())
    assert (len(store), store.draws, store.generation) == (50, 2, 1)
    slots = np.random.default_rng(0).permutation(50)
    for draw in (0, 1):
        arrays = store.gather(draw, slots)
        assert list(arrays) == ["image", "noise", "label", "slot"]
        assert np.array_equal(arrays["slot"], slots)
        assert np.array_equal(arrays["label"], slots % 10)
        assert (arrays["image"] == slots[:, None, None, None]).all()
        assert np.array_equal(arrays["noise"], noise_of(small_spec, draw, slots))


def test_large_records_read_back_too(make_store):
    spec = StoreSpec(
        rows=21,
        rows_per_shard=10,
        rows_per_block=4,
        fields=pair_fields((3, 40, 40), "float32"),
        coupling="independent",
        source="ab" * 32,
        codec="float32",
    )
    store = PairStore.open(make_store(1, spec))
    slots = np.random.default_rng(0).permutation(21)
    assert np.array_equal(store.gather(0, slots)["noise"], noise_of(spec, 0, slots))
    assert (store.gather(0, slots)["image"] == slots[:, None, None, None]).all()


def test_batches_are_the_records_in_float32(make_store, small_spec):
    store = PairStore.open(make_store())
    for batch in store.batches(8, seed=1, epochs=2):
        stored = store.gather(batch.draw, batch.slot)
        assert np.abs(batch.image - (stored["image"] / 127.5 - 1)).max() < 1e-6
        assert np.array_equal(batch.noise, stored["noise"].astype(np.float32))
        assert np.array_equal(batch.label, stored["label"])
        assert batch.draw == batch.epoch


def test_couplings_of_the_same_source_are_read_in_the_same_order(make_store, small_spec):
    first = PairStore.open(make_store(1))
    fields = pair_fields((1, 4, 4), "float32")
    other = PairStore.open(make_store(1, replace(small_spec, coupling="nfm", codec="float32", fields=fields), "other"))
    orders = [[batch.slot.tolist() for batch in store.batches(8, seed=4)] for store in (first, other)]
    assert orders[0] == orders[1]
    state = first.batches(8, seed=4).state_dict()
    with pytest.raises(StateMismatch, match="content_digest"):
        other.batches(8, seed=4).load_state_dict(state)


def test_the_index_has_a_row_a_record(make_store):
    store = PairStore.open(make_store())
    assert store.index().num_rows == 100
    assert store.index(["slot", "draw"], draw=1).to_pydict() == {"slot": list(range(50)), "draw": [1] * 50}


def test_a_reader_pins_its_generation(make_store):
    root = make_store(2, sealed=False)
    generations.seal(root, 1)
    early = PairStore.open(root)
    generations.seal(root, 2)
    assert (PairStore.open(root).generation, PairStore.open(root).draws) == (2, 2)
    assert PairStore.open(root, generation=1).manifest == early.manifest
    assert {batch.draw for batch in early.batches(10, epochs=3)} == {0}
    with pytest.raises(StateMismatch, match="order_key"):
        PairStore.open(root).batches(10).load_state_dict(early.batches(10).state_dict())
    with pytest.raises(StorageError, match="sealed: 1, 2"):
        PairStore.open(root, generation=3)


def test_stock_webdataset_reads_the_same_arrays(make_store):
    webdataset = pytest.importorskip("webdataset")
    root = make_store(1)
    store = PairStore.open(root)
    urls = [str(root / shard["payload"]) for shard in store.manifest["shards"]]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples[:3]] == [f"d000-s00000-b{block:05d}" for block in range(3)]
    everything = store.gather(0, np.arange(50))
    for name, array in everything.items():
        theirs = np.concatenate([sample[f"{name}.npy"] for sample in samples])
        assert theirs.dtype == array.dtype
        assert np.array_equal(theirs, array)


def test_gnu_tar_lists_the_members(make_store):
    root = make_store(1)
    shard = root / PairStore.open(root).manifest["shards"][2]["payload"]
    listing = subprocess.run(["tar", "-tvf", shard], capture_output=True, text=True, check=True)
    assert listing.stderr == ""
    lines = listing.stdout.splitlines()
    fields = ("image", "noise", "label", "slot")
    assert [line.split()[-1] for line in lines] == [
        f"d000-s00002-b{block:05d}.{field}.npy" for block in range(2) for field in fields
    ]
    assert all("1970-01-01" in line for line in lines)


def test_a_missing_or_truncated_shard_is_named_with_the_remedy(make_store):
    root = make_store()
    store = PairStore.open(root)
    paths = [root / shard["payload"] for shard in store.manifest["shards"]]
    paths[0].unlink()
    os.truncate(paths[1], paths[1].stat().st_size - 512)
    with pytest.raises(MissingShard, match=rf"{paths[0].name}.*nfm audit"):
        store.gather(0, np.array([3]))
    with pytest.raises(CorruptShard, match=rf"{paths[1].name}.*nfm audit"):
        store.gather(0, np.array([25]))
    assert store.gather(0, np.array([45]))["slot"].tolist() == [45]


def test_a_bad_shard_stops_the_batches_with_its_name(make_store):
    root = make_store()
    store = PairStore.open(root)
    path = root / store.manifest["shards"][2]["payload"]
    os.truncate(path, 1024)
    with pytest.raises(CorruptShard, match=path.name):
        list(store.batches(10))


def test_a_store_that_is_not_there_or_not_sealed_says_so(make_store, tmp_path):
    with pytest.raises(StorageError, match=r"spec\.json"):
        PairStore.open(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="nfm pairs seal"):
        PairStore.open(make_store(sealed=False))
    with pytest.raises(StorageError, match="local"):
        PairStore.open("s3://bucket/store")


def test_a_newer_schema_is_refused(make_store):
    root = make_store()
    body = json.loads((root / "manifest.g0001.json").read_text())
    del body["digest"]
    (root / "manifest.g0001.json").write_text(json.dumps(body | {"format": 2}))
    with pytest.raises(NewerSchema, match="format 2"):
        PairStore.open(root)


def test_rows_and_draws_outside_are_refused(make_store):
    store = PairStore.open(make_store())
    with pytest.raises(IndexError, match=r"0\.\.49"):
        store.gather(0, np.array([50]))
    with pytest.raises(StorageError, match="draw 2"):
        store.gather(2, np.array([0]))


def test_buffers_of_another_kind_are_refused(make_store):
    store = PairStore.open(make_store())
    for wrong in (np.empty((2, 1, 4, 4), np.float32), np.empty((3, 1, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="image"):
            store.gather(0, np.array([0, 1]), {"image": wrong})


def test_no_rows_give_empty_arrays(make_store):
    assert PairStore.open(make_store()).gather(0, np.array([], np.int64))["noise"].shape == (0, 1, 4, 4)


def test_a_store_of_many_shards_keeps_to_the_limit_of_open_files(make_store, small_spec):
    spec = replace(small_spec, rows=120, rows_per_shard=1)
    root = make_store(1, spec)
    store = PairStore.open(root)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        files = [root / shard["payload"] for shard in store.manifest["shards"]]
        sequence = ShardSequence(files, spec.fields, 120, 1, 8)
        rows = np.random.default_rng(0).permutation(120)
        before = len(os.listdir("/proc/self/fd"))
        for part in np.split(rows, 12):
            assert np.array_equal(sequence.gather(["slot"], part)["slot"], part)
        assert len(os.listdir("/proc/self/fd")) - before <= 32
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_reading_needs_no_torch(make_store):
    root = make_store()
    code = (
        "import sys; from nfm.storage import PairStore\n"
        "print(sum(len(batch) for batch in PairStore.open(sys.argv[1]).batches(10)))\n"
        "assert not {'torch', 'ray', 'sklearn', 'PIL', 'pydantic', 'webdataset'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("50", 0), done.stderr


def test_opening_and_reading_changes_nothing(make_store):
    root: Path = make_store()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    list(PairStore.open(root).batches(10))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
