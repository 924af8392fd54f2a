"""Verification is silent on a whole store, names the file of every damage, and changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from nfm.storage.files import atomic
from nfm.storage.format.spec import StoreSpec
from nfm.storage.layouts.tar_blocks import MappedShard, ShardWriter
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.shard_writer import write_shard
from nfm.storage.verify import LEVELS, orphans, verify

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "store-format-1"


def _snapshot(root: Path) -> dict[str, tuple[str, int]]:
    return {str(p): (atomic.digest(p.read_bytes()), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("level", LEVELS)
def test_a_whole_store_has_no_findings_and_is_not_touched(make_store, level) -> None:
    root = make_store(draws=2)
    before = _snapshot(root)
    assert verify(root, level=level) == []
    assert _snapshot(root) == before


def test_one_flipped_byte_anywhere_in_a_shard_is_found(make_store) -> None:
    root = make_store(draws=1)
    path = root / "shards" / "d000-s00001.a1.tar"
    whole = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole), 40):
        data = bytearray(whole)
        data[at] ^= 0x10
        path.write_bytes(data)
        (finding,) = verify(root, level="default")
        assert finding.file == str(path)
        assert finding.level == "default"
        assert "nfm repair" in finding.remedy
    path.write_bytes(whole)
    assert verify(root, level="default") == []


def test_a_truncated_shard_is_found_quickly(make_store) -> None:
    root = make_store(draws=1)
    path = root / "shards" / "d000-s00002.a1.tar"
    path.write_bytes(path.read_bytes()[:-1024])
    (finding,) = verify(root)
    assert finding.file == str(path)
    assert "truncated" in finding.problem


@pytest.mark.parametrize(
    "file", ["shards/d000-s00000.a1.tar", "index/d000-s00000.a1.parquet", "commits/d000-s00000.json"]
)
def test_a_missing_file_is_found_quickly_and_named(make_store, file: str) -> None:
    root = make_store(draws=1)
    (root / file).unlink()
    (finding,) = verify(root)
    assert finding.file == str(root / file)
    assert "missing" in finding.problem


@pytest.mark.parametrize("file", ["commits/d000-s00000.json", "manifest.g0001.json", "spec.json"])
def test_an_edited_record_is_found_quickly(make_store, file: str) -> None:
    root = make_store(draws=1)
    path = root / file
    path.write_text(path.read_text().replace("0", "1", 1))
    (finding,) = verify(root)
    assert finding.file == str(path)
    assert str(path) not in finding.problem


def test_a_changed_index_part_is_found(make_store) -> None:
    root = make_store(draws=1)
    path = root / "index" / "d000-s00001.a1.parquet"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    (finding,) = verify(root, level="default")
    assert finding.file == str(path)


def test_a_commit_swapped_after_sealing_is_found(make_store, small_spec: StoreSpec, records) -> None:
    root = make_store(draws=1)
    written = write_shard(root, small_spec, 0, 0, "b2", records(small_spec, 0, 0))
    commits.commit_path(root, "d000-s00000").unlink()
    commits.publish(root, written)
    (finding,) = verify(root)
    assert "not the commit that was sealed" in finding.problem


def _forge(root: Path, spec: StoreSpec, change) -> None:
    """A store whose digests all agree although shard 0 does not hold what it should."""
    written = commits.read(root, "d000-s00000")
    assert written is not None
    shard = MappedShard(root / written.payload.path, spec.fields, 20, spec.rows_per_block)
    arrays = {field.name: shard.read(field.name, 0, 20) for field in spec.fields}
    change(arrays)
    with ShardWriter(root / written.payload.path, spec.fields, 20, written.name, spec.rows_per_block) as writer:
        writer.append(arrays)
    path = commits.commit_path(root, written.name)
    body = atomic.read_json(path)
    atomic.write_json(path, body | {"payload_sha256": writer.files[0].sha256})
    seal.manifest_path(root, 1).unlink()
    seal.seal(root, 1)


def _repeat_a_slot(arrays: dict[str, np.ndarray]) -> None:
    arrays["slot"][5] = 4


def _spoil_noise(arrays: dict[str, np.ndarray]) -> None:
    arrays["noise"][3, 0, 0, 0] = np.nan


def _scale_noise(arrays: dict[str, np.ndarray]) -> None:
    arrays["noise"] *= 1.5


def _swap_labels(arrays: dict[str, np.ndarray]) -> None:
    arrays["label"][:2] = arrays["label"][:2][::-1].copy()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_repeat_a_slot, "slots are not each there once"),
        (_spoil_noise, "1 values of the noise are not finite"),
        (_scale_noise, "var of the noise"),
        (_swap_labels, "labels of its index part"),
    ],
)
def test_contents_that_contradict_the_commit_are_found_though_digests_agree(
    make_store, small_spec: StoreSpec, change, said: str
) -> None:
    root = make_store(draws=1)
    _forge(root, small_spec, change)
    assert verify(root) == []
    findings = verify(root, level="default")
    assert any(said in finding.problem for finding in findings)
    assert all(finding.file.endswith("d000-s00000.a1.tar") for finding in findings)


def test_an_older_generation_is_verified_by_its_number(make_store, small_spec: StoreSpec, records) -> None:
    root = make_store(draws=1)
    for shard in range(small_spec.shards_per_draw):
        written = write_shard(root, small_spec, 1, shard, "b", records(small_spec, 1, shard))
        commits.publish(root, written)
    seal.seal(root, 2)
    (root / "shards" / "d001-s00000.b.tar").unlink()
    assert verify(root, generation=1, level="default") == []
    assert len(verify(root)) == 1


def test_a_store_that_is_missing_or_never_sealed_is_reported(make_store, tmp_path: Path) -> None:
    root = make_store(draws=1, sealed=False)
    (finding,) = verify(root)
    assert "seal it with `nfm pairs seal" in finding.remedy
    shutil.rmtree(root)
    (finding,) = verify(root)
    assert "it has no spec.json" in finding.problem


@pytest.mark.parametrize("name", ["blocks", "samples", "zarr"])
def test_a_store_at_a_url_is_verified_like_a_local_one(name: str) -> None:
    """At every level, by streams and copies: no cache may stand between the check and what is stored."""
    memory = fsspec.filesystem("memory")
    url = f"memory://verified/{name}"
    for path in (path for path in (FIXTURES / name).rglob("*") if path.is_file()):
        memory.pipe_file(f"verified/{name}/{path.relative_to(FIXTURES / name)}", path.read_bytes())
    assert [verify(url, level=level) for level in LEVELS] == [[], [], []]
    assert orphans(url) == []
    file = "d001/image/c/1/0/0/0" if name == "zarr" else "shards/d001-s00001.fixture1.tar"
    whole = memory.cat_file(f"verified/{name}/{file}")
    memory.pipe_file(f"verified/{name}/{file}", whole[:-1] + bytes([whole[-1] ^ 1]))
    assert verify(url) == []
    (finding,) = verify(url, level="default")
    assert finding.file == f"{url}/{file}"
    memory.pipe_file(f"verified/{name}/{file}", whole)
    memory.pipe_file(f"verified/{name}/index/copy.parquet", b"x")
    (finding,) = verify(url)
    assert finding.file == f"{url}/index/copy.parquet"
    memory.rm(f"verified/{name}", recursive=True)
