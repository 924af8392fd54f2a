"""Every single-byte flip anywhere in a store is found by the default level, in every layout and every kind of file."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfm.storage.files import atomic
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.spec import StoreSpec, read_spec, write_spec
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.row_fields import write_row_field
from nfm.storage.ledger.shard_writer import write_shard
from nfm.storage.verify import Finding, orphans, verify
from tests.support.sizes import sized

FLIPS = sized(100, 400)  # of each layout: 1,200 together in full
LAYOUTS = {"blocks": "float16", "samples": "float16", "zarr": "int8"}


def records(spec: StoreSpec, shard: int, seed: int) -> list[dict[str, np.ndarray]]:
    slots, rng = np.array(spec.slots_of(shard)), np.random.default_rng((seed, shard))
    return [
        {
            "image": rng.integers(0, 256, (len(slots), *spec.image_shape), np.uint8),
            "noise": rng.standard_normal((len(slots), *spec.image_shape), np.float32),
            "label": slots % 10,
            "slot": slots,
        }
    ]


def make(root: Path, layout: str, seed: int = 0) -> Path:
    """One draw of two shards, the last one short, with a row-scoped field."""
    spec = StoreSpec(
        rows=10,
        rows_per_shard=6,
        rows_per_block=2,
        fields=pair_fields((1, 3, 2), LAYOUTS[layout]),
        coupling="independent",
        source="ab" * 32,
        codec=LAYOUTS[layout],
        classes=10,
        layout=layout,
    )
    write_spec(root, spec)
    for shard in range(2):
        commits.publish(root, write_shard(root, spec, 0, shard, "a1", records(spec, shard, seed)))
    seal.seal(root, 1)
    write_row_field(root, "caption", [np.arange(30, dtype=np.float16).reshape(10, 3)], (3,), "float16")
    return root


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def kind_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).parts
    if path.suffix == ".json":
        return parts[0] if parts[0] == "commits" else path.name
    return "shards" if parts[0].startswith("d0") else parts[0]


def named(path: Path, findings: list[Finding]) -> bool:
    return any(str(path) in finding.file or str(path) in finding.problem for finding in findings)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_flip_of_one_byte_anywhere_is_found_by_the_default_level(tmp_path: Path, layout: str) -> None:
    root = make(tmp_path / "store", layout)
    assert verify(root, level="default") == []
    rng, files, missed, seen = np.random.default_rng(7), files_of(root), [], Counter[str]()
    for number in range(FLIPS):
        path = files[number % len(files)]
        whole = path.read_bytes()
        at, mask = int(rng.integers(len(whole))), int(rng.integers(1, 256))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
        findings = verify(root, level="default")
        if not named(path, findings):
            missed.append((str(path), at, mask, findings))
        path.write_bytes(whole)
        seen[kind_of(path, root)] += 1
    print(f"{layout}: {FLIPS} flips, {len(missed)} missed; by kind of file: {dict(seen)}")
    assert missed == []
    assert min(seen.values()) >= FLIPS // 27
    assert verify(root, level="deep") == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_truncation_and_every_missing_file_is_found_by_the_quick_level(tmp_path: Path, layout: str) -> None:
    root = make(tmp_path / "store", layout)
    for path in files_of(root):
        whole = path.read_bytes()
        for size in {0, 1, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:size])
            assert named(path, verify(root)), (path, size)
        path.write_bytes(whole + b"\0")
        assert named(path, verify(root)), path
        path.unlink()
        # A field exists by its field.json: without it what remains is an attempt that was never finished.
        assert named(path, verify(root)) or path.name == "field.json", path
        path.write_bytes(whole)
    assert verify(root) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_two_files_swapped_are_found_even_those_of_equal_size(tmp_path: Path, layout: str) -> None:
    root = make(tmp_path / "store", layout)
    equal = make(tmp_path / "other", layout, seed=1)
    for path in files_of(root):
        other = equal / path.relative_to(root)
        if not other.exists():  # its attempt's name is its own
            continue
        whole = path.read_bytes()
        if whole != other.read_bytes():
            path.write_bytes(other.read_bytes())
            findings = verify(root, level="default")
            assert named(path, findings) or (path.name == "field.json" and findings), path
            path.write_bytes(whole)
    by_kind: dict[str, list[Path]] = {}
    for path in files_of(root):
        by_kind.setdefault(kind_of(path, root), []).append(path)
    for one, two in (pair for paths in by_kind.values() for pair in pairwise(paths)):
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
        assert first == second or verify(root, level="default"), (one, two)
        one.write_bytes(first)
        two.write_bytes(second)
    assert verify(root, level="default") == []


SURPLUS = [
    "notes.txt",
    "shards/extra.tar",
    "shards/d000-s00000.tar",
    "shards/d000-s00009.a1.tar",  # a shard that the spec has not
    "shards/copy of d000-s00000.a1.tar",
    "index/d000-s00007.a1.parquet",
    "index/x.parquet",
    "commits/d000-s00005.json",
    "commits/d000-s00000 (1).json",
    "commits/d000-s00000.json.bak",
    "manifest.g00001.json",
    "manifest.json",
    "fields/caption/more.npy",
    "fields/stray.npy",
    "d007/noise/c/0/0/0/0",
    "zarr.json.old",
    "new folder/file",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_belongs_to_nothing_is_found_by_the_quick_level(tmp_path: Path, layout: str) -> None:
    root = make(tmp_path / "store", layout)
    for name in SURPLUS:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        (finding,) = verify(root)
        assert finding.file == str(path)
        path.unlink()
    (root / "commits" / "link").symlink_to(tmp_path)
    (finding,) = verify(root)
    assert finding.file == str(root / "commits" / "link")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_killed_worker_leaves_is_no_finding_but_is_listed(tmp_path: Path, layout: str) -> None:
    root = make(tmp_path / "store", layout)
    spec = read_spec(root)
    killed = write_shard(root, spec, 0, 1, "killed", records(spec, 1, 0))
    next_draw = write_shard(root, spec, 1, 0, "b7", records(spec, 0, 0))
    (root / "shards" / ".tmp-12-ab-d000-s00000.c.tar").write_bytes(b"half")
    (root / "fields" / "next").mkdir()
    (root / "fields" / "next" / "s00000.0a1b.npy").write_bytes(b"half")
    (root / "audits").mkdir()
    (root / "audits" / "receipt.json").write_text("{}")
    assert verify(root, level="deep") == []
    left = orphans(root)
    files = [path for path in files_of(root) if ".killed" in str(path) or "d001-s00000.b7" in str(path)]
    expected = [*files, root / "shards" / ".tmp-12-ab-d000-s00000.c.tar", root / "fields" / "next" / "s00000.0a1b.npy"]
    assert sorted(left) == sorted(str(path.relative_to(root)) for path in expected)
    commits.publish(root, next_draw)  # committed and not yet sealed: whole, and no orphan
    assert verify(root, level="deep") == []
    assert not any(".b7" in name for name in orphans(root))
    path = next(path for path in files_of(root) if ".b7" in str(path) and "shards" in str(path))
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    assert named(path, verify(root, level="default"))
    assert verify(root, generation=1, level="default") == []
    assert killed.attempt == "killed"


def test_a_copied_commit_and_a_commit_of_another_store_are_found(tmp_path: Path) -> None:
    root, other = make(tmp_path / "store", "blocks"), make(tmp_path / "other", "blocks", seed=1)
    one, two = (root / "commits" / f"d000-s0000{shard}.json" for shard in range(2))
    whole = two.read_bytes()
    shutil.copy(one, two)
    (finding,) = verify(root)
    assert finding.file == str(two)
    shutil.copy(other / "commits" / two.name, two)
    assert any(f.file == str(two) and "not the commit that was sealed" in f.problem for f in verify(root))
    two.write_bytes(whole)
    shutil.copy(one, root / "commits" / "d001-s00000.json")
    assert named(root / "commits" / "d001-s00000.json", verify(root))


def test_a_manifest_of_another_store_with_equal_sizes_is_found(tmp_path: Path) -> None:
    root, other = make(tmp_path / "store", "blocks"), make(tmp_path / "other", "blocks", seed=1)
    shutil.copy(other / "manifest.g0001.json", root / "manifest.g0001.json")
    findings = verify(root)
    assert findings
    assert all("not the commit that was sealed" in f.problem or "moments" in f.problem for f in findings)
    shutil.copy(root / "manifest.g0001.json", root / "manifest.g0002.json")
    assert any("is the manifest of generation 1" in finding.problem for finding in verify(root))


def _second_names_first(shards: list[dict[str, Any]]) -> None:
    names = {key: shards[0][key] for key in ("payload", "index")}
    shards[1].update(names)


def _listed_twice(shards: list[dict[str, Any]]) -> None:
    shards[1] = shards[0]


def _reordered(shards: list[dict[str, Any]]) -> None:
    shards.reverse()


@pytest.mark.parametrize("change", [_second_names_first, _listed_twice, _reordered])
def test_two_entries_that_name_one_file_are_found_though_the_digest_agrees(
    tmp_path: Path, change: Callable[[list[dict[str, Any]]], None]
) -> None:
    root = make(tmp_path / "store", "blocks")
    path = root / "manifest.g0001.json"
    body = atomic.read_json(path)
    change(body["shards"])
    body["content_digest"] = atomic.content_digest(entry["sha256"] for entry in body["shards"])
    atomic.write_json(path, body)
    assert named(path, verify(root))


def test_records_that_only_stock_readers_see_differently_are_found_by_the_deep_level(tmp_path: Path) -> None:
    """The mapped read checks the headers of a shard's ends; a forged one in between misleads only stock readers."""
    root = make(tmp_path / "store", "samples")
    path = root / "shards" / "d000-s00000.a1.tar"
    data = bytearray(path.read_bytes())
    at = data.index(b"d000-000000002.noise.npy")
    data[at : at + 14] = b"d000-000000001"
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)
    sha256 = atomic.digest(bytes(data))
    commit = root / "commits" / "d000-s00000.json"
    atomic.write_json(commit, atomic.read_json(commit) | {"payload_sha256": sha256})
    (root / "manifest.g0001.json").unlink()
    seal.seal(root, 1)
    assert verify(root, level="default") == []
    (finding,) = verify(root, level="deep")
    assert finding.file == str(path)
    assert "a stock reader" in finding.problem


def test_a_chunk_whose_check_sum_is_wrong_is_found_by_the_deep_level(tmp_path: Path) -> None:
    root = make(tmp_path / "store", "zarr")
    path = root / "d000" / "image" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[2 * 6] ^= 1  # the crc32c behind the first chunk of two records
    path.write_bytes(data)
    commit = root / "commits" / "d000-s00000.json"
    body = atomic.read_json(commit)
    body["parts"][0]["sha256"] = atomic.digest(bytes(data))
    body["payload_sha256"] = atomic.content_digest(part["sha256"] for part in body["parts"])
    atomic.write_json(commit, body)
    (root / "manifest.g0001.json").unlink()
    seal.seal(root, 1)
    assert verify(root, level="default") == []
    (finding,) = verify(root, level="deep")
    assert "checksum" in finding.problem.lower() or "crc" in finding.problem.lower()
