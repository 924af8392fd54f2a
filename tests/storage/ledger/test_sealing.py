"""Before a generation is sealed: what is pending, what is missing, and what it records about the encoding."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.format.spec import StoreSpec, read_spec
from nfm.storage.ledger import commits, seal, shard_list
from nfm.storage.ledger.shard_writer import write_shard
from nfm.storage.verify import verify


def test_pending_is_known_from_the_names_of_the_commits(make_store, small_spec: StoreSpec) -> None:
    root = make_store(draws=2, sealed=False)
    commits.commit_path(root, "d001-s00001").unlink()
    for name in (".tmp-1-00-d001-s00001.json", "d001-s00001.json.orig", "notes.txt"):
        (root / "commits" / name).write_text("")
    commits.commit_path(root, "d000-s00000").write_text("never read here")
    assert commits.names(root, 1) == ["d000-s00000", "d000-s00001", "d000-s00002"]
    assert seal.pending(root, small_spec, 2) == ["d001-s00001"]
    assert seal.pending(root, small_spec, 3) == ["d001-s00001", *(f"d002-s0000{n}" for n in range(3))]
    assert seal.pending(root.parent / "new", small_spec, 1) == seal.names_of(small_spec, 1)


@pytest.mark.parametrize("folder", ["shards", "index"])
def test_nothing_is_sealed_over_a_file_that_went_away(make_store, small_spec: StoreSpec, folder: str) -> None:
    root = make_store(draws=1, sealed=False)
    path = next((root / folder).glob("d000-s00001.*"))
    path.write_bytes(path.read_bytes()[:-1])
    size = path.stat().st_size
    with pytest.raises(StorageError, match=rf"{path.name}: {size} bytes instead of {size + 1}.*nfm repair"):
        seal.seal(root, 1)
    path.unlink()
    with pytest.raises(StorageError, match=rf"{path.name}: missing, though .*d000-s00001\.json says.*nfm repair"):
        seal.seal(root, 1)
    assert seal.numbers(root) == []


def test_a_generation_says_how_its_pairs_were_encoded(make_store, small_spec: StoreSpec, records) -> None:
    root = make_store(draws=0, sealed=False)
    how: list[dict[str, Any]] = [
        {"precision": "bfloat16", "batch_size": 256, "noise_error": 0.004},
        {"precision": "bfloat16", "batch_size": 128, "noise_error": 0.005},
        {"precision": "float32", "batch_size": 256},
    ]
    for shard, facts in enumerate(how):
        written = write_shard(root, small_spec, 0, shard, "a1", records(small_spec, 0, shard))
        commits.publish(root, dataclasses.replace(written, **facts))
    body = seal.seal(root, 1)
    assert (body["noise_error"], body["precision"], body["batch_sizes"]) == (0.005, ["bfloat16", "float32"], [128, 256])
    assert body["bytes"] == sum(entry["bytes"] for entry in body["shards"])
    assert verify(root) == []
    path = seal.manifest_path(root, 1)
    for key, value in {"noise_error": 0.001, "precision": ["float32"], "bytes": 1, "shard_count": 2}.items():
        atomic.write_json(path, body | {key: value})
        assert [key in finding.problem for finding in verify(root)] == [True]


@pytest.mark.parametrize("value", [-1.0, "x", True, [1]])
def test_an_invalid_noise_error_is_refused(make_store, value: Any) -> None:
    root = make_store(draws=1, sealed=False)
    path = commits.commit_path(root, "d000-s00000")
    body = atomic.read_json(path)
    assert "noise_error" not in body
    atomic.write_json(path, body | {"noise_error": value})
    with pytest.raises(StorageError, match="noise_error"):
        commits.read(root, "d000-s00000")


def test_a_manifest_of_old_that_holds_the_same_is_the_same_generation(make_store) -> None:
    root = make_store(draws=1)
    path = seal.manifest_path(root, 1)
    later = ("bytes", "shard_count", "noise_error", "precision", "batch_sizes", "clipped", "digest")
    atomic.write_json(path, {key: value for key, value in atomic.read_json(path).items() if key not in later})
    body = seal.build(root, read_spec(root), 1)
    assert (body["generation"], body["shard_count"]) == (1, 3)
    assert seal.seal(root, 1)["generation"] == 1
    assert verify(root) == []


def test_the_files_of_a_generation_are_its_manifest_and_its_list(make_store, monkeypatch) -> None:
    root = make_store(draws=1)
    path = seal.manifest_path(root, 1)
    assert seal.files_of(root, 1) == [path]
    path.unlink()
    monkeypatch.setattr(shard_list, "INLINE", 0)
    listed = root / seal.build(root, read_spec(root), 1)["shards"]["file"]
    seal.seal(root, 1)
    assert seal.files_of(root, 1) == [path, listed]
    path.write_text("{")
    assert seal.files_of(root, 1) == [path, listed]
    assert seal.files_of(root, 2) == []
