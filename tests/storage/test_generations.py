"""A generation pins what a reader sees; a store grows by new generations and never changes an old one."""

from __future__ import annotations

from pathlib import Path

import pytest

from nfm.storage import atomic, commits, generations
from nfm.storage.errors import MissingShard, NewerSchema, StorageError
from nfm.storage.order import order_key
from nfm.storage.schema import StoreSpec, read_spec


def test_a_sealed_generation_lists_every_shard_in_order(make_store, small_spec: StoreSpec) -> None:
    root = make_store(draws=2)
    number, body = generations.newest(root)
    assert number == 1
    assert body["draws"] == 2
    assert body["records"] == 100
    assert [entry["name"] for entry in body["shards"]] == generations.names_of(small_spec, 2)
    assert body["order_key"] == order_key(small_spec.source, small_spec.rows, 2)
    assert body["content_digest"] == atomic.content_digest(entry["sha256"] for entry in body["shards"])
    assert body["moments"]["nonfinite"] == 0
    assert body["moments"]["var"] == pytest.approx(1, abs=0.1)


def test_pending_shards_are_listed_and_nothing_is_sealed(make_store) -> None:
    root = make_store(draws=1, sealed=False)
    with pytest.raises(MissingShard, match=r"3 of 6 .*d001-s00000, d001-s00001, d001-s00002; run"):
        generations.seal(root, 2)
    assert generations.newest(root) is None
    assert generations.next_number(root) == 1


def test_sealing_the_same_again_is_the_same_generation(make_store) -> None:
    root = make_store(draws=2)
    before = generations.manifest_path(root, 1).read_bytes()
    assert generations.seal(root, 2, config="another run")["generation"] == 1
    assert generations.build(root, read_spec(root), 2)["generation"] == 1
    assert generations.manifest_path(root, 1).read_bytes() == before
    assert generations.next_number(root) == 2


def test_more_draws_make_a_new_generation_and_leave_the_old(make_store, small_spec: StoreSpec, records) -> None:
    root = make_store(draws=1)
    before = generations.manifest_path(root, 1).read_bytes()
    for shard in range(small_spec.shards_per_draw):
        written = commits.write_shard(root, small_spec, 1, shard, "b", records(small_spec, 1, shard))
        commits.publish(root, written.commit())
    body = generations.seal(root, 2)
    assert body["generation"] == 2
    assert body["content_digest"] != generations.load(root, 1)["content_digest"]
    assert generations.manifest_path(root, 1).read_bytes() == before
    assert generations.newest(root)[0] == 2


def test_the_content_digest_ignores_attempts_and_hosts(tmp_path: Path, small_spec, make_store, records) -> None:
    one, other = make_store(draws=1), make_store(draws=0, name="other", sealed=False)
    for shard in reversed(range(small_spec.shards_per_draw)):
        written = commits.write_shard(other, small_spec, 0, shard, "zz", records(small_spec, 0, shard))
        commits.publish(other, written.commit(device="cuda", seconds=9.0))
    digests = {generations.seal(root, 1)["content_digest"] for root in (one, other)}
    assert len(digests) == 1


def test_the_pipelines_own_keys_are_kept_and_ignored(make_store) -> None:
    root = make_store(draws=1, sealed=False)
    generations.seal(root, 1, stage="pairs", inputs={"data": "abc"})
    assert generations.load(root, 1)["inputs"] == {"data": "abc"}
    assert generations.build(root, read_spec(root), 1)["inputs"] == {"data": "abc"}


def test_an_absent_newer_or_damaged_manifest_is_named(make_store) -> None:
    root = make_store(draws=1)
    path = generations.manifest_path(root, 1)
    with pytest.raises(StorageError, match=r"g0007\.json: no such generation \(sealed: 1\)"):
        generations.load(root, 7)
    body = atomic.read_json(path)
    atomic.write_json(path, body | {"format": 2})
    with pytest.raises(NewerSchema, match=r"g0001\.json.*format 2"):
        generations.newest(root)
    atomic.write_json(path, {"stage": "data"})
    with pytest.raises(StorageError, match=r"g0001\.json: no manifest of a pair store"):
        generations.load(root, 1)
    path.write_text("{")
    with pytest.raises(StorageError, match=r"g0001\.json: not valid JSON"):
        generations.load(root, 1)


def test_unpublished_and_foreign_files_are_no_generations(make_store) -> None:
    root = make_store(draws=1)
    (root / ".tmp-1-00-manifest.g0009.json").write_text("")
    (root / "manifest.g0008.json.orig").write_text("")
    (root / "manifest.json").write_text("{}")
    assert generations.numbers(root) == [1]
