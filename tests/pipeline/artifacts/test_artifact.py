"""Artifacts: fingerprints, finding them by name, spec first and manifest last, nothing committed ever changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nfm.pipeline.artifacts.artifact import (
    Artifact,
    ArtifactError,
    artifacts_root,
    find,
    fingerprint,
    open_spec,
    publish,
)
from nfm.stages.base import Result, Section, added, operational
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic

if TYPE_CHECKING:
    from tests.conftest import Lab


class Early(Section):
    """A section as its first version had it."""

    rate: float = 0.1
    workers: int = operational(1)


class Late(Early):
    """The same with a field that came later."""

    smooth: bool = added(False)


def key(section: Section, **inputs: str) -> str:
    return fingerprint("stage", 1, section.semantic(), inputs)


def test_a_fingerprint_depends_on_stage_version_semantic_config_and_input_content_alone() -> None:
    base = key(Early(), data="aa")
    assert key(Early(workers=8), data="aa") == base
    assert key(Late(), data="aa") == base
    others = [
        key(Early(rate=0.2), data="aa"),
        key(Late(smooth=True), data="aa"),
        key(Early(), data="ab"),
        key(Early(), teacher="aa"),
        fingerprint("other", 1, Early().semantic(), {"data": "aa"}),
        fingerprint("stage", 2, Early().semantic(), {"data": "aa"}),
    ]
    assert len({base, *others}) == 7


def test_a_fingerprint_is_what_it_was() -> None:
    """SHA-256 of the canonical JSON, written out: artifacts on disk must be found by every later version."""
    text = '{"config":{"rate":0.1},"inputs":{"data":"aa"},"stage":"stage","version":1}'
    assert key(Early(), data="aa") == atomic.digest(text.encode())


def test_the_fields_that_decide_how_work_is_done_stay_out() -> None:
    from nfm.stages.pairs.config import PairsConfig
    from nfm.stages.trained.student import StudentConfig

    semantic = PairsConfig().semantic()
    assert not {"draws", "executor", "workers", "threads", "device", "ray_address"} & set(semantic)
    assert {"coupling", "codec", "rows_per_shard", "flips", "seed", "batch_size", "precision"} <= set(semantic)
    assert not {"device", "save_every", "log_every"} & set(StudentConfig().semantic())


def made_up(folder: Path) -> Artifact:
    """A finished artifact with a payload and a file beside it."""
    open_spec(folder, {"fingerprint": "ab12", "stage": "data", "inputs": {}})
    atomic.write_bytes(folder / "payload.bin", b"payload")
    atomic.write_bytes(folder / "beside.txt", b"beside")
    publish(folder, Result(payload=["payload.bin"], files=["beside.txt"], metrics={"n": 3}), {"stage": "data"})
    return Artifact(folder)


def test_a_manifest_lists_files_with_bytes_and_sha256_and_a_digest_of_itself(tmp_path: Path) -> None:
    body = made_up(tmp_path / "a").manifest()
    assert [(file["path"], file["bytes"], file["payload"]) for file in body["files"]] == [
        ("payload.bin", 7, True),
        ("beside.txt", 6, False),
    ]
    assert body["files"][0]["sha256"] == atomic.digest(b"payload")
    assert body["content_digest"] == atomic.content_digest([atomic.digest(b"payload")])
    assert body["metrics"] == {"n": 3}
    text = (tmp_path / "a/manifest.json").read_text().replace('"n": 3', '"n": 4')
    (tmp_path / "a/manifest.json").write_text(text)
    with pytest.raises(StorageError, match="do not match its digest"):
        Artifact(tmp_path / "a").manifest()


def test_the_content_digest_knows_payload_and_order_alone(tmp_path: Path) -> None:
    first = made_up(tmp_path / "a").manifest()
    folder = tmp_path / "b"
    open_spec(folder, {"fingerprint": "ab12"})
    atomic.write_bytes(folder / "renamed.bin", b"payload")
    again = publish(folder, Result(payload=["renamed.bin"], metrics={"n": 9}), {"stage": "data", "seconds": 3.0})
    assert again["content_digest"] == first["content_digest"]
    given = publish(
        tmp_path / "b", Result(payload=[], metrics={}, content_digest="cd", manifest="manifest.g0001.json"), {}
    )
    assert given["content_digest"] == "cd"


def test_a_manifest_is_never_written_twice(tmp_path: Path) -> None:
    artifact = made_up(tmp_path / "a")
    before = (artifact.path / "manifest.json").read_bytes()
    with pytest.raises(ArtifactError, match="another process finished this artifact"):
        publish(artifact.path, Result(payload=["payload.bin"], metrics={}), {})
    assert (artifact.path / "manifest.json").read_bytes() == before


def test_without_a_manifest_an_artifact_is_started_and_not_done(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path / "data/abc")
    assert (artifact.started, artifact.done) == (False, False)
    open_spec(artifact.path, {"fingerprint": "ab12"})
    assert (artifact.started, artifact.done) == (True, False)
    open_spec(artifact.path, {"fingerprint": "ab12"})
    with pytest.raises(ArtifactError, match="holds another fingerprint"):
        open_spec(artifact.path, {"fingerprint": "ab13"})


def test_a_manifest_of_a_newer_schema_is_refused_by_name(tmp_path: Path) -> None:
    artifact = made_up(tmp_path / "a")
    body = {**artifact.manifest(), "schema": 2}
    (artifact.path / "manifest.json").unlink()
    atomic.create_json(artifact.path / "manifest.json", body)
    with pytest.raises(ArtifactError, match=r"manifest.json: schema 2 is newer .* upgrade nfm-pairs"):
        artifact.manifest()


def test_artifacts_are_found_by_folder_manifest_name_and_unique_prefix(
    made: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NFM_ARTIFACTS", str(made.artifacts))
    assert artifacts_root() == made.artifacts
    teacher, store = made.only("teacher"), made.only("pairs")
    for name in (teacher.path, teacher.name, teacher.path.name, teacher.path.name[:7], teacher.path / "manifest.json"):
        assert find(name).path == teacher.path
        assert find(name).done
    assert find(store.path / "manifest.g0001.json").reference == store.path / "manifest.g0001.json"
    assert find(store.name).manifest_name == "manifest.g0001.json"
    with pytest.raises(ArtifactError, match="`nfm ls` lists"):
        find("pairs/nothing")


def test_a_prefix_of_several_artifacts_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NFM_ARTIFACTS", str(tmp_path))
    made_up(tmp_path / "data/abc1")
    made_up(tmp_path / "teacher/abc2")
    with pytest.raises(ArtifactError, match="several artifacts: data/abc1, teacher/abc2; write more"):
        find("abc")
    assert find("abc2").name == "teacher/abc2"
    assert find("data/ab").name == "data/abc1"
    with pytest.raises(ArtifactError, match="no artifact"):
        find("*")


def test_the_newest_generation_of_a_store_is_found(made: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "pairs" / made.only("pairs").path.name
    shutil.copytree(made.only("pairs").path, store)
    body: dict[str, Any] = json.loads((store / "manifest.g0001.json").read_text())
    atomic.create_json(store / "manifest.g0002.json", {**body, "generation": 2})
    assert find(store).manifest_name == "manifest.g0002.json"
    assert find(store / "manifest.g0001.json").manifest_name == "manifest.g0001.json"
