"""A generation pins what a reader sees; a store grows by new generations and never changes an old one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from nfm.storage import layouts as layouts
from nfm.storage.errors import MissingShard, NewerSchema, StorageError
from nfm.storage.files import atomic
from nfm.storage.files.paths import as_path
from nfm.storage.format.index import read_index
from nfm.storage.format.order import order_key
from nfm.storage.format.spec import StoreSpec, read_spec, write_spec
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.shard_writer import write_shard


def test_a_sealed_generation_lists_every_shard_in_order(make_store, small_spec: StoreSpec) -> None:
    root = make_store(draws=2)
    number, body = seal.newest(root)
    assert number == 1
    assert body["draws"] == 2
    assert body["records"] == 100
    assert [entry["name"] for entry in body["shards"]] == seal.names_of(small_spec, 2)
    assert body["order_key"] == order_key(small_spec.source, small_spec.rows, 2)
    assert body["content_digest"] == atomic.content_digest(entry["sha256"] for entry in body["shards"])
    assert body["moments"]["nonfinite"] == 0
    assert body["moments"]["var"] == pytest.approx(1, abs=0.1)


def test_pending_shards_are_listed_and_nothing_is_sealed(make_store) -> None:
    root = make_store(draws=1, sealed=False)
    with pytest.raises(MissingShard, match=r"3 of 6 .*d001-s00000, d001-s00001, d001-s00002; run"):
        seal.seal(root, 2)
    assert seal.newest(root) is None
    assert seal.next_number(root) == 1


def test_sealing_the_same_again_is_the_same_generation(make_store) -> None:
    root = make_store(draws=2)
    before = seal.manifest_path(root, 1).read_bytes()
    assert seal.seal(root, 2, config="another run")["generation"] == 1
    assert seal.build(root, read_spec(root), 2)["generation"] == 1
    assert seal.manifest_path(root, 1).read_bytes() == before
    assert seal.next_number(root) == 2


def test_more_draws_make_a_new_generation_and_leave_the_old(make_store, small_spec: StoreSpec, records) -> None:
    root = make_store(draws=1)
    before = seal.manifest_path(root, 1).read_bytes()
    for shard in range(small_spec.shards_per_draw):
        written = write_shard(root, small_spec, 1, shard, "b", records(small_spec, 1, shard))
        commits.publish(root, written)
    body = seal.seal(root, 2)
    assert body["generation"] == 2
    assert body["content_digest"] != seal.load(root, 1)["content_digest"]
    assert seal.manifest_path(root, 1).read_bytes() == before
    assert seal.newest(root)[0] == 2


def test_the_content_digest_ignores_attempts_and_hosts(tmp_path: Path, small_spec, make_store, records) -> None:
    one, other = make_store(draws=1), make_store(draws=0, name="other", sealed=False)
    for shard in reversed(range(small_spec.shards_per_draw)):
        written = write_shard(other, small_spec, 0, shard, "zz", records(small_spec, 0, shard))
        commits.publish(other, dataclasses.replace(written, device="cuda", seconds=9.0))
    digests = {seal.seal(root, 1)["content_digest"] for root in (one, other)}
    assert len(digests) == 1


def test_the_pipelines_own_keys_are_kept_and_ignored(make_store) -> None:
    root = make_store(draws=1, sealed=False)
    seal.seal(root, 1, stage="pairs", inputs={"data": "abc"})
    assert seal.load(root, 1)["inputs"] == {"data": "abc"}
    assert seal.build(root, read_spec(root), 1)["inputs"] == {"data": "abc"}


def test_an_absent_newer_or_damaged_manifest_is_named(make_store) -> None:
    root = make_store(draws=1)
    path = seal.manifest_path(root, 1)
    with pytest.raises(StorageError, match=r"g0007\.json: no such generation \(sealed: 1\)"):
        seal.load(root, 7)
    body = atomic.read_json(path)
    atomic.write_json(path, body | {"format": 2})
    with pytest.raises(NewerSchema, match=r"g0001\.json.*format 2"):
        seal.newest(root)
    atomic.write_json(path, {"stage": "data"})
    with pytest.raises(StorageError, match=r"g0001\.json: no manifest of a pair store"):
        seal.load(root, 1)
    path.write_text("{")
    with pytest.raises(StorageError, match=r"g0001\.json: not valid JSON"):
        seal.load(root, 1)


def test_unpublished_and_foreign_files_are_no_generations(make_store) -> None:
    root = make_store(draws=1)
    (root / ".tmp-1-00-manifest.g0009.json").write_text("")
    (root / "manifest.g0008.json.orig").write_text("")
    (root / "manifest.json").write_text("{}")
    assert seal.numbers(root) == [1]


HOSTILE = [None, True, -1, 0, 1.5, 2**70, "", "x", "../x", [], {}, [{}], [[]], {"a": []}]


@pytest.mark.parametrize("layout", ["blocks", "zarr"])
def test_a_hostile_manifest_is_a_storage_error_and_its_paths_are_not_followed(make_store, spec_of, layout: str) -> None:
    root = make_store(1, spec_of(layout))
    body = {key: value for key, value in seal.load(root, 1).items() if key != "digest"}
    first, *rest = body["shards"]
    entries = [first | {key: value} for key in first for value in HOSTILE]
    entries += [first | {"payload": "shards/../../../etc/passwd.tar"}, first | {"index": "/etc/passwd"}]
    changes = [{key: value} for key in body for value in HOSTILE]
    changes += [{"shards": [entry, *rest]} for entry in entries]
    for change in changes:
        atomic.write_json(seal.manifest_path("memory://hostile", 1), body | change)
        try:
            loaded = seal.load("memory://hostile", 1)
        except StorageError:
            continue
        for entry in loaded["shards"]:
            assert entry["payload"].startswith(f"shards/{entry['name']}.a1"), change
            assert ".." not in entry["payload"] + entry["index"]


def test_the_names_of_absurdly_many_shards_are_not_made(small_spec: StoreSpec) -> None:
    spec = dataclasses.replace(small_spec, rows=100_000, rows_per_shard=1)
    with pytest.raises(StorageError, match="too many"):
        seal.names_of(spec, 1000)


@pytest.mark.parametrize("layout", ["blocks", "samples", "zarr"])
@pytest.mark.parametrize("label", [True, False])
def test_a_store_lives_at_a_url_as_in_a_folder(make_store, spec_of, records, layout: str, label: bool) -> None:
    spec = spec_of(layout, label=label)
    local = make_store(2, spec)
    root = f"memory://test-{layout}-{label}"
    write_spec(root, spec)
    for draw in (1, 0):
        for shard in range(spec.shards_per_draw):
            written = write_shard(root, spec, draw, shard, "u", records(spec, draw, shard))
            loser = write_shard(root, spec, draw, shard, "v", records(spec, draw, shard))
            won = commits.publish(root, written)
            assert commits.publish(root, loser) == won
    with pytest.raises(StorageError, match="no such generation"):
        seal.load(root, 1)
    body = seal.seal(root, 2)
    assert body["content_digest"] == seal.load(local, 1)["content_digest"]
    assert seal.newest(root) == (1, seal.load(root, 1))
    assert seal.build(root, read_spec(root), 2)["generation"] == 1
    for entry, twin in zip(body["shards"], seal.load(local, 1)["shards"]):
        index = read_index(as_path(root) / entry["index"], ["slot", "label"], entry["records"])
        assert index.equals(read_index(local / twin["index"], ["slot", "label"]))
        for file, same in zip(layouts.files(spec, entry), layouts.files(spec, twin)):
            assert (as_path(root) / file.path).read_bytes() == (local / same.path).read_bytes()
    assert not [file for file in as_path(root).fs.find(as_path(root).path) if ".v" in file]


def test_a_sealed_zarr_store_at_a_url_is_opened_by_stock_zarr(make_store, spec_of, records) -> None:
    zarr = pytest.importorskip("zarr")
    spec, root = spec_of("zarr"), "memory://stock-zarr"
    write_spec(root, spec)
    for shard in range(spec.shards_per_draw):
        commits.publish(root, write_shard(root, spec, 0, shard, "u", records(spec, 0, shard)))
    seal.seal(root, 1)
    stock = zarr.open(root, mode="r")
    np.testing.assert_array_equal(stock["d000/slot"][...], np.arange(50))
