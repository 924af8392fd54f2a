"""A generation of many shards lists them in a file beside its manifest; users of the store see no difference."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nfm.pipeline.artifacts.artifact import find
from nfm.pipeline.upkeep import audit as auditing
from nfm.storage import PairStore
from nfm.storage.errors import StorageError
from nfm.storage.export import export
from nfm.storage.files import atomic
from nfm.storage.files.copies.cache import ShardCache
from nfm.storage.format.spec import StoreSpec, read_spec, write_spec
from nfm.storage.ledger import commits, seal, shard_list
from nfm.storage.ledger.shard_list import SCHEMA, read_list
from nfm.storage.ledger.shard_writer import write_shard
from nfm.storage.verify import LEVELS, orphans, verify
from tests.support.buckets.s3server import S3

FIELDS = ("image", "noise", "label", "slot", "draw")


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every store that is sealed from here on lists its shards in a file."""
    monkeypatch.setattr(shard_list, "INLINE", 0)


def rows_of(root: Path) -> list[dict[str, Any]]:
    return [entry.to_json() for entry in seal.load(root, 1).shards]


def written(root: Path, generation: int, rows: list[dict[str, Any]], dictionary: bool = False) -> dict[str, Any]:
    """A list of these rows, whatever they say; what a manifest would say of it."""
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), root / "list", compression="zstd", use_dictionary=dictionary)
    data = (root / "list").read_bytes()
    name = shard_list.list_name(generation, atomic.digest(data))
    (root / "list").rename(root / name)
    return {"file": name, "sha256": atomic.digest(data), "bytes": len(data), "count": len(rows)}


def pair(make_store: Any, monkeypatch: pytest.MonkeyPatch, spec: StoreSpec) -> tuple[Path, Path]:
    """The same store twice: its shards in the manifest, and beside it."""
    inline = make_store(2, spec, "inline")
    monkeypatch.setattr(shard_list, "INLINE", 0)
    return inline, make_store(2, spec, "listed")


def read(root: str | Path, cache: ShardCache | None = None, **how: Any) -> list[dict[str, Any]]:
    batches = PairStore.open(root, cache=cache).batches(7, seed=3, epochs=2, last="keep", **how)
    return [{name: np.asarray(getattr(batch, name)).tolist() for name in FIELDS} for batch in batches]


@pytest.mark.parametrize("layout", ["blocks", "zarr"])
def test_both_ways_of_listing_are_one_store_to_its_readers(make_store, spec_of, monkeypatch, layout: str) -> None:
    inline, beside = pair(make_store, monkeypatch, spec_of(layout))
    assert isinstance(atomic.read_json(inline / "manifest.g0001.json")["shards"], list)
    assert atomic.read_json(beside / "manifest.g0001.json")["shards"]["count"] == 6
    one, two = (PairStore.open(root) for root in (inline, beside))
    assert (one.order_key, one.content_digest) == (two.order_key, two.content_digest)
    for here, there in zip(one.sealed.shards, two.sealed.shards, strict=True):
        index = dataclasses.replace(there.index, sha256=here.index.sha256)  # it holds times, as the commit does
        assert here == dataclasses.replace(there, index=index, commit_sha256=here.commit_sha256)
    assert one.index().equals(two.index())
    for how in ({}, {"shuffle": "windowed", "window": 1}, {"filter": [("label", "in", [1, 2, 3])]}):
        assert read(inline, **how) == read(beside, **how)


@pytest.mark.parametrize("layout", ["blocks", "zarr"])
def test_a_store_with_a_list_verifies_at_every_level(listed, make_store, spec_of, layout: str) -> None:
    root = make_store(2, spec_of(layout))
    assert [verify(root, level=level) for level in LEVELS] == [[], [], []]
    assert orphans(root) == []
    (found,) = auditing.audit([find(root)], "quick")
    assert (found.findings, found.files) == ([], 6)
    assert found.bytes == sum(entry.payload.bytes for entry in seal.load(root, 1).shards)


def test_an_export_of_a_store_with_a_list_holds_the_same_pairs(listed, make_store, tmp_path: Path) -> None:
    root = make_store(2)
    export(PairStore.open(root), tmp_path / "out", "samples")
    assert read(tmp_path / "out") == read(root)
    assert verify(tmp_path / "out", level="default") == []


def test_a_store_with_a_list_on_an_object_store_is_read_through_the_cache(
    listed, s3: S3, bucket: str, small_spec: StoreSpec, records, make_store, tmp_path: Path
) -> None:
    root = f"{bucket}/store"
    write_spec(root, small_spec)
    for shard in range(small_spec.shards_per_draw):
        made = write_shard(root, small_spec, 0, shard, "a", records(small_spec, 0, shard))
        commits.publish(root, made)
    seal.seal(root, 1)
    assert seal.seal(root, 1).number == 1
    cache = ShardCache(tmp_path / "cache")
    assert read(root, cache) == read(make_store(1))
    assert verify(root, level="default") == []
    assert orphans(root) == []


def test_sealing_again_finds_the_list_and_leaves_no_file(listed, make_store, monkeypatch) -> None:
    root = make_store(2)
    before = sorted(path.name for path in root.iterdir())
    assert seal.seal(root, 2).number == 1
    monkeypatch.setattr(shard_list, "INLINE", 1000)  # a version that would list them in the manifest
    assert seal.build(root, read_spec(root), 2)["generation"] == 1
    assert sorted(path.name for path in root.iterdir()) == before


def test_a_list_that_no_manifest_names_is_an_orphan_and_one_of_a_damaged_manifest_is_kept(listed, make_store) -> None:
    root = make_store(1)
    body = seal.build(root, read_spec(root), 1) | {"generation": 2}
    assert body["shards"]["file"].startswith("manifest.g0001.")
    killed = written(root, 2, rows_of(root))["file"]
    assert orphans(root) == [killed]
    assert verify(root) == []
    path = seal.manifest_path(root, 1)
    path.write_text(path.read_text().replace("0", "1", 1))
    assert orphans(root) == [killed]


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_list_is_named_by_readers_and_by_verification(listed, make_store, damage: str) -> None:
    root = make_store(1)
    path = root / atomic.read_json(root / "manifest.g0001.json")["shards"]["file"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(StorageError, match=path.name):
        PairStore.open(root)
    assert any(path.name in f"{finding}" for finding in verify(root))


HOSTILE = [
    {"name": "../x"}, {"name": "d000-s99999"}, {"payload": "/etc/passwd"}, {"payload": "shards/../../x.tar"},
    {"payload": "shards/d000-s00001.a1.tar"}, {"payload": "shards/d000-s00000.a1"},
    {"payload": "shards/d000-s00000.a\n.tar"}, {"index": "index/../../x.parquet"},
    {"index": "index/d000-s00000.other.parquet"}, {"sha256": "x"}, {"sha256": "AB" * 32},
    {"index_sha256": ""}, {"commit_sha256": "ab" * 33}, {"bytes": -1}, {"index_bytes": -1}, {"records": 0},
    {"name": None}, {"bytes": None}, {"parts": [{"field": "noise", "sha256": "ab" * 32, "bytes": 1}]},
]  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE)
def test_a_hostile_row_is_refused_though_all_digests_agree(make_store, tmp_path: Path, change: dict[str, Any]) -> None:
    first, *rest = rows_of(make_store(1))
    reference = written(tmp_path, 1, [first | change, *rest])
    with pytest.raises(StorageError, match=f"{reference['file']}.*row 0"):
        read_list(tmp_path, "manifest", 1, reference)


@pytest.mark.parametrize(
    "change",
    [{"field": "../x"}, {"field": None}, {"sha256": "x"}, {"bytes": -1}, {"bytes": None}],
)
def test_a_hostile_part_is_refused_though_all_digests_agree(
    make_store, spec_of, tmp_path: Path, change: dict[str, Any]
) -> None:
    entries = rows_of(make_store(1, spec_of("zarr")))
    found = read_list(tmp_path, "manifest", 1, written(tmp_path, 1, entries))
    assert [entry.to_json() for entry in found] == entries
    entries[2]["parts"] = [entries[2]["parts"][0] | change, *entries[2]["parts"][1:]]
    with pytest.raises(StorageError, match="row 2"):
        read_list(tmp_path, "manifest", 1, written(tmp_path, 1, entries))


@pytest.mark.parametrize("value", [None, True, -1, 1.5, 2**70, "", "x", "../x", [], {}])
@pytest.mark.parametrize("key", ["file", "sha256", "bytes", "count"])
def test_a_hostile_reference_is_refused(listed, make_store, key: str, value: Any) -> None:
    root = make_store(1)
    path = seal.manifest_path(root, 1)
    body = atomic.read_json(path)
    atomic.write_json(path, body | {"shards": body["shards"] | {key: value}})
    with pytest.raises(StorageError):
        len(seal.load(root, 1).shards)


def test_a_list_that_would_decode_to_far_more_than_it_holds_is_refused(make_store, tmp_path: Path) -> None:
    (first, *_) = rows_of(make_store(1))
    for dictionary in (True, False):
        reference = written(tmp_path, 1, [first | {"name": "x" * 100_000}] * 50, dictionary)
        with pytest.raises(StorageError, match="would decode to more"):
            read_list(tmp_path, "manifest", 1, reference)


def test_a_list_is_a_sequence_of_entries(listed, make_store) -> None:
    shards = seal.load(make_store(2), 1).shards
    entries = list(shards)
    assert (shards[0], shards[-1], len(shards)) == (entries[0], entries[5], 6)
    assert list(shards[2:4]) == entries[2:4]
    assert list(shards[::-2]) == entries[::-2]
    assert list(shards[4:2]) == []
    assert list(shards[1:]) == entries[1:]
    with pytest.raises(IndexError):
        shards[6]
