"""A generation pins what a reader sees; a store grows by new generations and never changes an old one."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from nfm.storage import PairStore
from nfm.storage import errors as storage_errors
from nfm.storage import layouts as layouts
from nfm.storage.errors import MissingShard, NewerSchema, StorageError
from nfm.storage.files import atomic
from nfm.storage.files.paths import as_path
from nfm.storage.format.index import read_index
from nfm.storage.format.order import order_key
from nfm.storage.format.spec import StoreSpec, read_spec, write_spec
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.shard_writer import write_shard
from nfm.storage.verify import verify


def test_a_sealed_generation_lists_every_shard_in_order(make_store, small_spec: StoreSpec) -> None:
    root = make_store(draws=2)
    sealed = seal.newest(root)
    assert (sealed.number, sealed.draws, sealed.records) == (1, 2, 100)
    assert [entry.name for entry in sealed.shards] == seal.names_of(small_spec, 2)
    assert sealed.order_key == order_key(small_spec.source, small_spec.rows, 2)
    assert sealed.content_digest == atomic.content_digest(entry.payload.sha256 for entry in sealed.shards)
    assert sealed.body["moments"]["nonfinite"] == 0
    assert sealed.body["moments"]["var"] == pytest.approx(1, abs=0.1)


def test_pending_shards_are_listed_and_nothing_is_sealed(make_store) -> None:
    root = make_store(draws=1, sealed=False)
    with pytest.raises(MissingShard, match=r"3 of 6 .*d001-s00000, d001-s00001, d001-s00002; make"):
        seal.seal(root, 2)
    assert seal.newest(root) is None
    assert seal.next_number(root) == 1


def test_sealing_the_same_again_is_the_same_generation(make_store) -> None:
    root = make_store(draws=2)
    before = seal.manifest_path(root, 1).read_bytes()
    assert seal.seal(root, 2, config="another run").number == 1
    assert seal.build(root, read_spec(root), 2)["generation"] == 1
    assert seal.manifest_path(root, 1).read_bytes() == before
    assert seal.next_number(root) == 2


def test_more_draws_make_a_new_generation_and_leave_the_old(make_store, small_spec: StoreSpec, records) -> None:
    root = make_store(draws=1)
    before = seal.manifest_path(root, 1).read_bytes()
    for shard in range(small_spec.shards_per_draw):
        written = write_shard(root, small_spec, 1, shard, "b", records(small_spec, 1, shard))
        commits.publish(root, written)
    sealed = seal.seal(root, 2)
    assert sealed.number == 2
    assert sealed.content_digest != seal.load(root, 1).content_digest
    assert seal.manifest_path(root, 1).read_bytes() == before
    assert seal.newest(root).number == 2


@pytest.mark.parametrize("layout", ["blocks", "zarr"])
def test_fewer_draws_are_a_part_and_readers_of_the_folder_keep_the_larger_generation(
    make_store, spec_of, layout: str
) -> None:
    root = make_store(2, spec_of(layout))
    alone = seal.seal(make_store(1, spec_of(layout), "alone"), 1)
    part = seal.seal(root, 1)
    assert (part.number, part.draws, part.body["part_of"]) == (2, 1, 1)
    assert (part.content_digest, part.order_key) == (alone.content_digest, alone.order_key)
    assert PairStore.open(root).generation == seal.newest_number(root) == 1
    assert PairStore.open(root, generation=2).draws == 1
    assert seal.seal(root, 1).number == 2  # a second time nothing is sealed
    assert seal.seal(root, 2).number == 1
    assert verify(root, level="default") == []


def test_a_part_is_the_newest_generation_once_the_larger_one_is_set_aside(make_store) -> None:
    root = make_store(draws=2)
    seal.seal(root, 1)
    seal.manifest_path(root, 1).unlink()
    assert seal.newest(root).draws == 1


def test_a_damaged_newest_manifest_is_told_and_no_other_taken_in_its_place(make_store) -> None:
    root = make_store(draws=2)
    seal.seal(root, 1)
    seal.manifest_path(root, 2).write_text("{")
    with pytest.raises(StorageError, match=r"g0002\.json: not valid JSON"):
        PairStore.open(root)


def test_the_content_digest_ignores_attempts_and_hosts(tmp_path: Path, small_spec, make_store, records) -> None:
    one, other = make_store(draws=1), make_store(draws=0, name="other", sealed=False)
    for shard in reversed(range(small_spec.shards_per_draw)):
        written = write_shard(other, small_spec, 0, shard, "zz", records(small_spec, 0, shard))
        commits.publish(other, dataclasses.replace(written, device="cuda", seconds=9.0))
    digests = {seal.seal(root, 1).content_digest for root in (one, other)}
    assert len(digests) == 1


def test_the_pipelines_own_keys_are_kept_and_ignored(make_store) -> None:
    root = make_store(draws=1, sealed=False)
    seal.seal(root, 1, stage="pairs", inputs={"data": "abc"})
    assert seal.load(root, 1).body["inputs"] == {"data": "abc"}
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
    root, where = make_store(1, spec_of(layout)), f"memory://hostile-{layout}"
    write_spec(where, spec_of(layout))
    body = {key: value for key, value in seal.load(root, 1).body.items() if key != "digest"}
    first, *rest = body["shards"]
    entries = [first | {key: value} for key in first for value in HOSTILE]
    entries += [first | {"payload": "shards/../../../etc/passwd.tar"}, first | {"index": "/etc/passwd"}]
    changes = [{key: value} for key in body for value in HOSTILE]
    changes += [{"shards": [entry, *rest]} for entry in entries]
    for change in changes:
        atomic.write_json(seal.manifest_path(where, 1), body | change)
        try:
            entries = list(seal.load(where, 1).shards)
        except StorageError:
            continue
        for entry in entries:
            assert entry.payload.path.startswith(f"shards/{entry.name}.a1"), change
            assert ".." not in entry.payload.path + entry.index.path


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
    sealed = seal.seal(root, 2)
    assert sealed.content_digest == seal.load(local, 1).content_digest
    assert seal.newest(root).body == seal.load(root, 1).body
    assert seal.build(root, read_spec(root), 2)["generation"] == 1
    for entry, twin in zip(sealed.shards, seal.load(local, 1).shards, strict=True):
        index = read_index(as_path(root) / entry.index.path, ["slot", "label"], entry.records)
        assert index.equals(read_index(local / twin.index.path, ["slot", "label"]))
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


def test_only_the_ledgers_records_know_how_a_file_is_listed() -> None:
    """Whoever else asks a `Generation`, an `Entry` or a `Commit`: what they say was checked."""
    root = Path(storage_errors.__file__).resolve().parents[2]
    keys = re.compile(r"""["'](commit_sha256|index_sha256|index_bytes|payload_sha256|payload_bytes)["']""")
    knowing = {
        f"{path.relative_to(root)}"
        for folder in ("storage", "stages", "pipeline", "trainers")
        for path in (root / folder).rglob("*.py")
        if keys.search(path.read_text(encoding="utf-8"))
    }
    ledger = {"storage/ledger/shard_list.py", "storage/ledger/shard_list_checks.py"}
    assert knowing == {"storage/format/commit.py", *ledger}
