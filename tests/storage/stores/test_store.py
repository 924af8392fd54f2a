"""A pair store reads back what was committed, through our reader and through stock ones."""

from __future__ import annotations

import gc
import json
import os
import pickle
import resource
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from nfm.storage import (
    CorruptShard,
    MissingShard,
    NewerSchema,
    PairStore,
    PairWriter,
    ShardCache,
    StateMismatch,
    StorageError,
)
from nfm.storage.errors import OutOfRange
from nfm.storage.files.atomic import content_digest, write_json
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.order import order_key
from nfm.storage.format.spec import StoreSpec, write_spec
from nfm.storage.layouts import files as files_of
from nfm.storage.layouts.tar_blocks import MappedShard, shard_bytes
from nfm.storage.ledger import seal
from nfm.storage.ledger.row_fields import write_row_field
from nfm.storage.reading.gathering.shards import ShardSequence
from tests.support.patience import allowed


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
        stored = store.gather(batch.epoch, batch.slot)
        assert np.abs(batch.image - (stored["image"] / 127.5 - 1)).max() < 1e-6
        assert np.array_equal(batch.noise, stored["noise"].astype(np.float32))
        assert np.array_equal(batch.label, stored["label"])
        assert (batch.draw == batch.epoch).all()


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
    seal.seal(root, 1)
    early = PairStore.open(root)
    seal.seal(root, 2)
    assert (PairStore.open(root).generation, PairStore.open(root).draws) == (2, 2)
    assert PairStore.open(root, generation=1).manifest == early.manifest
    assert {draw for batch in early.batches(10, epochs=3) for draw in batch.draw} == {0}
    with pytest.raises(StateMismatch, match="content_digest"):
        PairStore.open(root).batches(10).load_state_dict(early.batches(10).state_dict())
    with pytest.raises(StorageError, match="sealed: 1, 2"):
        PairStore.open(root, generation=3)


def test_stock_webdataset_reads_the_same_arrays(make_store):
    webdataset = pytest.importorskip("webdataset")
    root = make_store(1)
    store = PairStore.open(root)
    urls = [str(root / shard.payload.path) for shard in store.sealed.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples[:3]] == [f"d000-s00000-b{block:05d}" for block in range(3)]
    everything = store.gather(0, np.arange(50))
    for name, array in everything.items():
        theirs = np.concatenate([sample[f"{name}.npy"] for sample in samples])
        assert theirs.dtype == array.dtype
        assert np.array_equal(theirs, array)


def test_gnu_tar_lists_the_members(make_store):
    root = make_store(1)
    shard = root / PairStore.open(root).sealed.shards[2].payload.path
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
    paths = [root / shard.payload.path for shard in store.sealed.shards]
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
    path = root / store.sealed.shards[2].payload.path
    os.truncate(path, 1024)
    with pytest.raises(CorruptShard, match=path.name):
        list(store.batches(10))


def test_a_store_that_is_not_there_or_not_sealed_says_so(make_store, tmp_path):
    with pytest.raises(StorageError, match=r"no such folder"):
        PairStore.open(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="nfm pairs seal"):
        PairStore.open(make_store(sealed=False))
    with pytest.raises(StorageError, match=r"memory.*spec\.json"):
        PairStore.open("memory://nowhere/store")


def test_a_newer_schema_is_refused(make_store):
    root = make_store()
    body = json.loads((root / "manifest.g0001.json").read_text())
    write_json(root / "manifest.g0001.json", body | {"format": 2})
    with pytest.raises(NewerSchema, match="format 2"):
        PairStore.open(root)


def test_rows_and_draws_outside_are_refused(make_store):
    store = PairStore.open(make_store())
    for call in (store.gather, store.image_rows):
        for wrong in ([3, 50, 51], [-1]):
            with pytest.raises(OutOfRange, match=rf"{store.root}: slot {wrong[-2:][0]} .* outside 0\.\.49") as told:
                call(0, np.array(wrong))
            assert isinstance(told.value, IndexError)
    for number in (-1, 99):
        with pytest.raises(StorageError, match=f"number is -1|shard {number} is outside"):
            store.shard(0, number)
    with pytest.raises(StorageError, match="draw 2"):
        store.gather(2, np.array([0]))


def test_buffers_of_another_kind_are_refused(make_store):
    store = PairStore.open(make_store())
    for wrong in (np.empty((2, 1, 4, 4), np.float64), np.empty((3, 1, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="image"):
            store.gather(0, np.array([0, 1]), {"image": wrong})
    with pytest.raises(ValueError, match=r"out\['label'\] is float32 2: it must be .* int64 2"):
        store.gather(0, np.array([0, 1]), {"label": np.empty(2, np.float32)})


def test_no_rows_give_empty_arrays(make_store):
    assert PairStore.open(make_store()).gather(0, np.array([], np.int64))["noise"].shape == (0, 1, 4, 4)


def test_a_store_of_many_shards_keeps_to_the_limit_of_open_files(make_store, small_spec):
    spec = replace(small_spec, rows=120, rows_per_shard=1)
    root = make_store(1, spec)
    store = PairStore.open(root)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))  # by tests before this one, too
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 100, hard))
    try:
        files = [root / shard.payload.path for shard in store.sealed.shards]
        sequence = ShardSequence(lambda n: MappedShard(files[n], spec.fields, 1, 8), spec.fields, 120, 1, 8)
        rows = np.random.default_rng(0).permutation(120)
        before = len(os.listdir("/proc/self/fd"))
        for part in np.split(rows, 12):
            assert np.array_equal(sequence.gather(["slot"], part)["slot"], part)
        assert len(os.listdir("/proc/self/fd")) - before <= (opened + 100) // 4
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


@pytest.mark.parametrize("layout", ["blocks", "samples", "zarr"])
@pytest.mark.parametrize("codec", ["float32", "float16", "int8"])
def test_every_layout_and_codec_gives_the_same_batches(make_store, spec_of, layout, codec):
    plain = PairStore.open(make_store(1, spec_of("blocks", "float32"), "plain"))
    store = PairStore.open(make_store(1, spec_of(layout, codec)))
    error = {"float32": 0, "float16": 0.002, "int8": 0.0251}[codec]
    options = {"shuffle": "windowed", "window": 1, "last": "keep", "seed": 2}
    for device in (None, "cpu"):
        for ours, theirs in zip(store.batches(8, device=device, **options), plain.batches(8, **options), strict=True):
            assert np.array_equal(ours.slot, theirs.slot)
            assert np.array_equal(ours.image, theirs.image)
            assert np.array_equal(ours.label, theirs.label)
            assert np.abs(np.asarray(ours.noise) - theirs.noise).max() <= error
    for batch in store.batches(8, raw=True, **options):
        stored = store.gather(0, batch.slot)
        assert (batch.image.dtype, batch.noise.dtype) == (np.uint8, np.dtype(codec))
        assert np.array_equal(batch.noise, stored["noise"])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_float_images_keep_their_values(make_store, spec_of, dtype):
    store = PairStore.open(make_store(1, spec_of(image_dtype=dtype, label=False)))
    for batch in store.batches(8):
        assert batch.image.dtype == np.float32
        assert (batch.image == batch.slot[:, None, None, None]).all()
        assert set(batch.label) == {-1}
    assert next(store.batches(8, raw=True)).image.dtype == dtype


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "uint8"])
def test_row_fields_are_joined_by_image_row(tmp_path, small_spec, records, dtype):
    spec, root = replace(small_spec, coupling="semidiscrete-ot"), tmp_path / "store"
    values = np.random.default_rng(0).integers(0, 200, (50, 3)).astype(dtype)
    rows = [np.random.default_rng(draw).permutation(50) for draw in range(2)]
    with PairWriter(root, spec, draws=2) as writer:
        for draw in range(2):
            for shard in range(spec.shards_per_draw):
                for part in records(spec, draw, shard):
                    row = rows[draw][part.pop("slot")]
                    image = np.broadcast_to(row[:, None, None, None], part["image"].shape).astype(np.uint8)
                    writer.write(**part | {"row": row, "image": image, "label": row % 10}, draw=draw)
    write_row_field(root, "caption", [values], (3,), dtype)
    store = PairStore.open(root)
    for options in ({}, {"device": "cpu"}, {"raw": True}):
        for batch in store.batches(8, epochs=2, fields=["caption"], **options):
            caption = np.asarray(batch.fields["caption"])
            expected = values[rows[batch.epoch][np.asarray(batch.slot)]]
            assert np.array_equal(caption, expected)
            assert caption.dtype == (np.float32 if dtype == "float16" and "raw" not in options else dtype)
    assert np.array_equal(store.image_rows(1, np.array([4, 2])), rows[1][[4, 2]])
    with pytest.raises(StorageError, match=r"no field 'title'.*caption"):
        store.batches(8, fields=["title"])


def test_opening_two_million_records_takes_less_than_half_a_second(tmp_path, small_spec):
    spec = replace(small_spec, rows=2_000_000, rows_per_shard=4096, rows_per_block=256)
    write_spec(tmp_path, spec)
    write_json(tmp_path / "manifest.g0001.json", manifest_of(spec, 1))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        store = PairStore.open(tmp_path)
        reader = store.batches(256)
        times.append(time.perf_counter() - begin)
    assert min(times) < allowed(0.5)
    assert (len(store), len(store.sealed.shards)) == (2_000_000, 489)
    with pytest.raises(MissingShard, match="the shard is missing"):  # no shard was looked at before
        next(reader)


def manifest_of(spec: StoreSpec, draws: int) -> dict[str, object]:
    names = seal.names_of(spec, draws)
    slots = [len(spec.slots_of(number)) for number in range(spec.shards_per_draw)] * draws
    entries = [
        {
            "name": name,
            "payload": f"shards/{name}.a1.tar",
            "sha256": f"{number:064x}",
            "bytes": shard_bytes(spec.fields, records, spec.rows_per_block),
            "index": f"index/{name}.a1.parquet",
            "index_sha256": f"{number:064x}",
            "index_bytes": 60_000,
            "records": records,
            "commit_sha256": f"{number:064x}",
        }
        for number, (name, records) in enumerate(zip(names, slots))
    ]
    return {
        "format": 1,
        "generation": 1,
        "draws": draws,
        "order_key": order_key(spec.source, spec.rows, draws),
        "content_digest": content_digest(str(entry["sha256"]) for entry in entries),
        "records": spec.rows * draws,
        "shards": entries,
        "moments": dict.fromkeys(("mean", "var", "kurtosis", "min", "max"), 0.0) | {"nonfinite": 0},
    }


def test_threads_and_readers_share_a_store(make_store):
    store = PairStore.open(make_store())
    expected = [batch.slot.tolist() for batch in store.batches(7, epochs=4, last="keep")]
    found: list[list[list[int]]] = []

    def read(shuffle) -> None:
        found.append([batch.slot.tolist() for batch in store.batches(7, epochs=4, last="keep", shuffle="full")])

    several = [threading.Thread(target=read, args=("full",)) for _ in range(6)]
    for thread in several:
        thread.start()
    one, two = store.batches(7, epochs=4, last="keep"), store.batches(7, epochs=4, last="keep")
    found.append([batch.slot.tolist() for pair in zip(one, two) for batch in pair][::2])
    for thread in several:
        thread.join()
    assert found == [expected] * 7


def upload(root: Path, url: str) -> str:
    filesystem, _, (path,) = fsspec.get_fs_token_paths(url)
    filesystem.put(str(root), f"{path}/store", recursive=True)
    return f"{url}/store"


@pytest.mark.parametrize("layout", ["blocks", "zarr"])
@pytest.mark.parametrize("shuffle", ["full", "windowed", None])
def test_a_store_at_a_url_reads_the_same(make_store, spec_of, bucket, s3, tmp_path, layout, shuffle):
    root, cache = make_store(2, spec_of(layout)), ShardCache(tmp_path / "cache")
    here, there = PairStore.open(root), PairStore.open(upload(root, bucket), cache=cache)
    options = {"shuffle": shuffle, "window": 1, "epochs": 3, "last": "keep"}
    pairs = zip(here.batches(7, **options), there.batches(7, **options), strict=True)
    assert all(np.array_equal(ours.noise, theirs.noise) for ours, theirs in pairs)
    files = [file.sha256 for entry in here.sealed.shards for file in files_of(here.spec, entry)]
    assert s3.count("GET", ".tar") + s3.count("GET", "/c/") == len(set(files))  # each content once, in three epochs
    chosen = [batch.slot.tolist() for batch in there.batches(5, filter=[("label", "==", 3)])]
    assert chosen == [batch.slot.tolist() for batch in here.batches(5, filter=[("label", "==", 3)])]
    assert there.index().equals(here.index())


def test_shards_are_fetched_as_they_are_needed(make_store, bucket, s3, tmp_path):
    store = PairStore.open(upload(make_store(), bucket), cache=ShardCache(tmp_path / "cache"))
    reader = store.batches(5, shuffle=None, window=1, epochs=2)
    assert s3.count("GET", "/shards/") == 0
    next(reader)
    assert 1 <= s3.count("GET", "/shards/") <= 3
    assert s3.count("GET", "d001") == 0
    reader.close()


def test_full_order_of_a_draw_larger_than_the_cache_is_refused(make_store, bucket, tmp_path):
    root = make_store()
    url, size = upload(root, bucket), sum(path.stat().st_size for path in (root / "shards").glob("d000*"))
    small = ShardCache(tmp_path / "small", size - 1)
    with pytest.raises(StorageError, match=r"shuffle='windowed'.*NFM_CACHE_BYTES"):
        PairStore.open(url, cache=small).batches(5)
    with pytest.raises(StorageError, match="smaller window"):
        PairStore.open(url, cache=small).batches(5, shuffle="windowed", window=2)
    one = max(path.stat().st_size for path in (root / "shards").iterdir())
    tight = PairStore.open(url, cache=ShardCache(tmp_path / "tight", 2 * one))
    for _ in range(2):
        seen = [slot for batch in tight.batches(5, shuffle="windowed", window=1) for slot in batch.slot]
        assert sorted(seen) == list(range(50))
        assert sum(path.stat().st_size for path in (tmp_path / "tight").iterdir()) <= 2 * one


def test_a_store_goes_to_another_process_by_its_address(make_store):
    store = PairStore.open(make_store(), generation=1)
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.root, copy.generation, copy.content_digest) == (store.root, 1, store.content_digest)


def test_a_manifest_cannot_name_files_outside_the_store(make_store, tmp_path):
    root = make_store(1)
    body = json.loads((root / "manifest.g0001.json").read_text())
    (tmp_path / "secret.tar").write_bytes((root / body["shards"][0]["payload"]).read_bytes())
    body["shards"][0]["payload"] = "../secret.tar"
    write_json(root / "manifest.g0001.json", body)
    with pytest.raises(StorageError, match="store"):
        next(PairStore.open(root).batches(50))


def test_a_store_that_nobody_uses_is_gone_with_its_files(make_store):
    store, before = PairStore.open(make_store()), len(os.listdir("/proc/self/fd"))
    gc.disable()
    try:
        list(store.batches(10, shuffle="full"))
        assert len(os.listdir("/proc/self/fd")) > before
        del store
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()
