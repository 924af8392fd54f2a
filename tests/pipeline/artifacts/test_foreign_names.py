"""Names in metadata from elsewhere cannot lead out of the folder: nothing is read, written or removed through them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from nfm.pipeline.artifacts.artifact import Artifact
from nfm.pipeline.artifacts.lineage import ancestors, inputs_of
from nfm.pipeline.artifacts.lock import Lock
from nfm.pipeline.cli.compare import _copy
from nfm.pipeline.console import Console, StopRequest
from nfm.pipeline.upkeep import gc
from nfm.pipeline.upkeep.audit import audit
from nfm.pipeline.upkeep.repair import repair_store
from nfm.stages.stores import leftovers
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from tests.storage.verify.test_hostile import store

DIGEST = "ab" * 32


def artifact(folder: Path, **spec: Any) -> Artifact:
    """A folder that says it is a finished artifact without files."""
    body = {"stage": "features", "version": 1, "config": {}, "inputs": {}, "external": {}, "fingerprint": DIGEST}
    atomic.write_json(folder / "spec.json", body | spec)
    atomic.write_json(folder / "manifest.json", {"fingerprint": DIGEST, "content_digest": DIGEST, "files": []})
    return Artifact(folder)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NFM_ARTIFACTS", str(tmp_path / "artifacts"))
    return tmp_path / "artifacts"


@pytest.mark.parametrize(
    "reference",
    [
        {"artifact": "../elsewhere/x", "manifest": "manifest.json", "content_digest": DIGEST},
        {"artifact": "data/x", "manifest": "../../elsewhere/x/manifest.json", "content_digest": DIGEST},
        {"artifact": "data/x", "manifest": "/etc/passwd", "content_digest": DIGEST},
        {"artifact": "data/x\0", "manifest": "manifest.json", "content_digest": DIGEST},
        {"artifact": 7, "manifest": "manifest.json", "content_digest": DIGEST},
        {"artifact": "data/x"},
        "data/x",
    ],
)
def test_an_error_about_a_reference_that_leads_elsewhere_names_its_spec(root: Path, reference: Any) -> None:
    found = artifact(root / "features" / "x", inputs={"data": reference})
    with pytest.raises(StorageError, match=r"features/x/spec\.json: .*restore it from a copy"):
        inputs_of(found)
    assert ancestors(found) == [found]
    (result,) = audit([found], "quick")
    assert [Path(finding.file).name for finding in result.findings] == ["spec.json"]


def test_receipts_are_written_beside_what_the_user_named_and_what_is_under_the_root(root: Path, tmp_path: Path) -> None:
    elsewhere = artifact(tmp_path / "elsewhere" / "data" / "x", stage="data")
    reference = {"artifact": str(elsewhere.path), "manifest": "manifest.json", "content_digest": DIGEST}
    found = artifact(root / "features" / "x", inputs={"data": reference})
    assert audit([found], "quick")[0].artifact == str(elsewhere.path)
    assert (found.path / "audits").is_dir()
    assert not (elsewhere.path / "audits").exists()
    audit([elsewhere], "quick")
    assert (elsewhere.path / "audits").is_dir()


@pytest.mark.parametrize("how", ["a link", "a pipe"])
def test_no_receipt_is_written_through_a_link_and_the_audit_ends(root: Path, tmp_path: Path, how: str) -> None:
    found = artifact(root / "features" / "x")
    (tmp_path / "target").mkdir()
    (found.path / "audits").symlink_to(tmp_path / "target") if how == "a link" else os.mkfifo(found.path / "audits")
    assert len(audit([found], "quick")) == 1
    assert not list((tmp_path / "target").iterdir())


def test_files_that_a_manifest_lists_elsewhere_are_not_read(root: Path, tmp_path: Path) -> None:
    found = artifact(root / "features" / "x")
    (tmp_path / "secret").write_bytes(b"secret")
    (found.path / "link").symlink_to(tmp_path / "secret")
    names = ("../../../secret", str(tmp_path / "secret"), "link")
    facts = {"bytes": 6, "sha256": atomic.digest(b"secret"), "payload": False}
    body = atomic.read_json(found.path / "manifest.json")
    atomic.write_json(found.path / "manifest.json", {**body, "files": [{"path": name, **facts} for name in names]})
    (result,) = audit([found])
    assert len([finding for finding in result.findings if "out of the store" in finding.problem]) == 3
    with pytest.raises(StorageError, match="leads out of the store"):
        _copy_of(found, tmp_path / "table")
    assert [path.name for path in (tmp_path / "table").iterdir()] == ["origin.json"]


def _copy_of(found: Artifact, output: Path) -> None:
    output.mkdir()
    body = atomic.read_json(found.path / "manifest.json")
    atomic.write_json(found.path / "manifest.json", {**body, "inputs": {}})
    _copy(found, output)


@pytest.mark.parametrize("change", [{"id": "../../up"}, {"pid": "../../tmp"}, {"host": 3}, {"beat": None}])
def test_a_foreign_lock_is_reported_and_its_names_become_no_files(root: Path, change: dict[str, Any]) -> None:
    found = artifact(root / "features" / "x")
    lock = Lock(found.path)
    atomic.write_json(found.path / "lock.json", {**lock._body, "born": "1", **change})
    before = sorted(root.rglob("*"))
    with pytest.raises(StorageError, match=r"lock\.json: no lock of ours"), lock:
        pass
    assert sorted(root.rglob("*")) == before


def test_events_are_not_written_through_a_link(root: Path, tmp_path: Path) -> None:
    found = artifact(root / "features" / "x")
    (tmp_path / "target").mkdir()
    (found.path / "events").symlink_to(tmp_path / "target")
    with pytest.raises(StorageError, match=r"events: a link out of the store"):
        Console("features", found.path / "events", StopRequest())
    assert not list((tmp_path / "target").iterdir())


def test_gc_removes_nothing_that_a_link_leads_to(root: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    (outer / "20200101T000000Z").mkdir(parents=True)
    for name in ("d000-s00000.json", ".tmp-1-a-x", "20200101T000000Z/kept"):
        (outer / name).write_bytes(b"theirs")
    path = store(root / "pairs")
    (path / "quarantine").symlink_to(outer)
    assert leftovers.leftovers(path) == []
    other = artifact(root / "features" / "x")
    for name in ("commits", "events", "audits", "failed"):
        (other.path / name).symlink_to(outer)
    past = time.time() - 10 * 86400
    for file in (*outer.rglob("*"), *other.path.iterdir(), other.path):
        os.utime(file, (past, past), follow_symlinks=False)
    found = gc.listing([], 3600.0)
    assert "features/x" in [one.name for one in found.going]
    gone = gc.remove([one for one in found.going if one.name == "features/x"], 3600.0, print)
    assert [one.name for one in gone] == ["features/x"]
    assert not other.path.exists()
    assert len([file for file in outer.rglob("*") if file.is_file()]) == 3


@pytest.mark.parametrize("linked", ["shards", "quarantine"])
def test_a_repair_moves_nothing_through_a_link(root: Path, tmp_path: Path, linked: str) -> None:
    path = store(root / "pairs")
    payload = sorted((path / "shards").iterdir())[0]
    payload.write_bytes(payload.read_bytes()[:-512])  # bad
    outer = tmp_path / "outer"
    if linked == "shards":
        (path / "shards").rename(outer)
    else:
        outer.mkdir()
    (path / linked).symlink_to(outer)
    before = sorted(outer.rglob("*"))
    with pytest.raises(StorageError, match=rf"{linked}: a link out of the store"):
        repair_store(Artifact(path))
    assert sorted(outer.rglob("*")) == before
