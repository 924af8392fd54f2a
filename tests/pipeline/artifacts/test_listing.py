"""The artifacts of a bucket are listed in few requests, whatever lies beside them and whatever is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nfm.pipeline import overview
from nfm.pipeline.artifacts.listing import listed
from nfm.storage.files import atomic
from nfm.storage.files.paths import as_path, size_below
from tests.support.buckets.s3server import S3


def put(root: Path, name: str, made_from: str = "", finished: bool = True) -> Path:
    inputs = {"data": {"artifact": made_from}} if made_from else {}
    body = {"stage": name.partition("/")[0], "fingerprint": "0" * 64, "inputs": inputs}
    atomic.write_json(root / name / "spec.json", body)
    if finished:
        manifest = "manifest.g0002.json" if name.startswith("pairs") else "manifest.json"
        atomic.write_json(root / name / manifest, {**body, "bytes": 5_000})
    return root / name


@pytest.fixture
def root(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NFM_ARTIFACTS", f"{bucket}/run")
    return as_path(f"{bucket}/run")


def test_rows_say_state_size_and_what_was_made_from_it(root: Path) -> None:
    put(root, "data/000000000001")
    put(root, "pairs/000000000002", "data/000000000001")
    put(root, "student/000000000003", "pairs/000000000002", finished=False)
    damaged = put(root, "student/000000000004")
    put(root, "teacher/000000000006", finished=False)
    put(root, "features/000000000007", "teacher/000000000006")
    (damaged / "manifest.json").write_bytes(b"{}")
    (root / "student/000000000005/spec.json").write_bytes(json.dumps({"of": "somebody else"}).encode())
    (root / "data/notes.txt").write_bytes(b"a user's own")
    rows = {row["artifact"]: row for row in overview.inventory()}
    assert {name: (row["state"], row["needed by"]) for name, row in rows.items()} == {
        "data/000000000001": ("done", "pairs/000000000002"),
        "pairs/000000000002": ("done", "student/000000000003"),
        "student/000000000003": ("started", "-"),
        "student/000000000004": ("damaged", "-"),
        "teacher/000000000006": ("damaged", "features/000000000007"),
        "features/000000000007": ("done", "-"),
    }


@pytest.mark.parametrize("name", ["student/000000000001", "pairs/000000000002"])
def test_a_size_is_that_of_all_files_also_of_those_that_no_manifest_counts(root: Path, name: str) -> None:
    folder = put(root, name)
    for file, size in (("shards/d000-s00000.a.tar", 7_000), ("fields/caption/s0.npy", 20_000), ("commits/a.json", 300)):
        atomic.write_bytes(folder / file, bytes(size))
    (one,) = listed(root)
    assert one.bytes == size_below(folder) > 27_300


def test_requests_are_one_an_artifact_and_a_few_a_stage_and_one_more_a_store(root: Path, s3: S3) -> None:
    for number in range(6):
        put(root, f"student/{number:012x}")
        put(root, f"pairs/{number:012x}")
        (root / f"pairs/{number:012x}/shards/d000-s00000.a.tar").write_bytes(b"")
    s3.requests.clear()
    assert len(listed(root)) == 12
    azure = s3.scheme == "az"  # adlfs asks for a file of a folder's name first, and lists some folders twice
    assert s3.count("HEAD") <= 7 * azure
    assert s3.count("GET", ".json") == 12
    assert s3.count("GET") - 12 <= 6 + 4 + azure, "listings: one a store of less than a thousand files, and a few"


def test_a_read_that_fails_once_is_made_again(
    root: Path, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root, "student/000000000001")
    for kind in ("error", "reset", "flip"):
        s3.fail(kind, "manifest.json", method="GET")
        monkeypatch.setenv("NFM_SCRATCH", str(tmp_path / kind))
        assert [one.damaged for one in listed(root)] == [False]


def test_a_manifest_is_read_once_on_a_machine_unless_it_is_another_by_now(root: Path, s3: S3) -> None:
    put(root, "data/000000000001")
    put(root, "student/000000000002", "data/000000000001")
    before = listed(root)
    s3.requests.clear()
    assert listed(root) == before
    assert s3.count("GET", ".json") == 0
    (root / "student/000000000002/manifest.json").write_bytes(b"{}")
    assert [one.damaged for one in listed(root)] == [False, True]
    put(root, "student/000000000002")
    assert [one.inputs for one in listed(root)] == [[], []]
