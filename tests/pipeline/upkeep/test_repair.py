"""Repair sets bad shards aside, touches no good one, and the store comes back with the same content."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.pipeline import builder, runner
from nfm.pipeline.artifacts.artifact import ArtifactError, find
from nfm.pipeline.artifacts.lock import Held, Lock
from nfm.pipeline.config import load
from nfm.pipeline.upkeep.audit import audit
from nfm.pipeline.upkeep.repair import repair_store
from nfm.storage.ledger import shard_list, standing

if TYPE_CHECKING:
    from tests.conftest import Lab


def damage(store: Path, what: str) -> str:
    """Spoil one shard in one of the ways in which shards go bad; returns its name."""
    payload, index = sorted(store.glob("shards/*.tar"))[3], sorted(store.glob("index/*.parquet"))[3]
    name = payload.name.split(".")[0]
    commit = store / "commits" / f"{name}.json"
    if what == "flipped":
        data = bytearray(payload.read_bytes())
        data[len(data) // 2] ^= 1
        payload.write_bytes(data)
    elif what == "truncated":
        payload.write_bytes(payload.read_bytes()[:-1])
    elif what == "missing":
        payload.unlink()
    elif what == "index":
        index.write_bytes(index.read_bytes()[:-8])
    else:
        commit.write_text(commit.read_text().replace('"records": 64', '"records": 63'))
    return name


def test_a_copy_is_told_to_be_copied_again_as_the_stage_would_never_touch_it(lab: Lab, tmp_path: Path) -> None:
    store = lab.only("pairs").path
    assert standing.again(store) == "run the pairs stage again"
    assert standing.again(shutil.copytree(store, tmp_path / "copy")).startswith("copy it again from the artifact")


@pytest.mark.parametrize("what", ["flipped", "truncated", "missing", "index", "commit"])
def test_a_bad_shard_goes_to_quarantine_and_is_encoded_again_the_same(lab: Lab, root: Path, what: str) -> None:
    store = lab.only("pairs")
    before, content = lab.committed(), store.manifest()["content_digest"]
    name = damage(store.path, what)
    assert repair_store(store) == [name]
    prefix = f"pairs/{store.path.name}"
    kept = {
        path: digest for path, digest in before.items() if name not in path and path != f"{prefix}/manifest.g0001.json"
    }
    after = lab.committed()
    assert kept.items() <= after.items()
    assert [path for path in after if path.startswith(prefix) and name in path and "quarantine" not in path] == []
    assert list((store.path / "quarantine").glob(f"*/commits/{name}.json"))
    assert list((store.path / "quarantine").glob("*/manifest.g0001.json"))
    runner.run(builder.build(load(lab.config)), "pairs")
    assert find(store.path).manifest()["content_digest"] == content
    assert repair_store(find(store.path)) == []
    assert not [finding for result in audit([lab.only("report")]) for finding in result.findings]


@pytest.mark.parametrize("layout", ["samples", "zarr"])
def test_a_bad_shard_of_every_layout_is_encoded_again_the_same(lab: Lab, root: Path, layout: str) -> None:
    sets = ["pairs.coupling=independent", f"pairs.layout={layout}", "pairs.codec=int8"]
    store = runner.run(builder.build(load(lab.config, sets)), "pairs")
    content = store.manifest()["content_digest"]
    assert not [finding for result in audit([store], "deep") for finding in result.findings]
    pattern = "d001/noise/c/2/0/0/0" if layout == "zarr" else "shards/d001-s00002.*"
    (path,) = store.path.glob(pattern)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    found = [finding.file for result in audit([store]) for finding in result.findings]
    assert found == [str(path)]
    assert repair_store(store) == ["d001-s00002"]
    assert list((store.path / "quarantine").rglob(path.name))
    again = runner.run(builder.build(load(lab.config, sets)), "pairs")
    assert again.path == store.path
    assert again.manifest()["content_digest"] == content
    assert not [finding for result in audit([again], "deep") for finding in result.findings]
    assert repair_store(again) == []


def test_a_manifest_that_cannot_be_read_is_set_aside_and_the_store_sealed_again(lab: Lab, root: Path) -> None:
    store = lab.only("pairs")
    content, path = store.manifest()["content_digest"], store.path / store.manifest_name
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    assert repair_store(store) == [path.name]
    runner.run(builder.build(load(lab.config)), "pairs")
    assert find(store.path).manifest()["content_digest"] == content
    assert not [finding for result in audit([lab.only("report")]) for finding in result.findings]


def test_the_list_of_shards_of_a_large_store_goes_where_its_manifest_goes(
    lab: Lab, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_list, "INLINE", 0)
    runner.run(builder.build(load(lab.config, ["pairs.draws=3"])), "pairs")
    store = lab.only("pairs")
    (listed,) = store.path.glob("manifest.g0002.*.parquet")
    damage(store.path, "flipped")
    repair_store(store)
    assert not listed.exists()
    assert list((store.path / "quarantine").glob(f"*/{listed.name}"))
    runner.run(builder.build(load(lab.config, ["pairs.draws=3"])), "pairs")
    again = find(store.path)
    assert len(list(store.path.glob("manifest.g0003.*.parquet"))) == 1
    assert not [finding for result in audit([again]) for finding in result.findings]


def test_a_whole_store_is_left_alone(lab: Lab, root: Path) -> None:
    before = lab.committed()
    assert repair_store(lab.only("pairs")) == []
    assert lab.committed() == before


def test_students_of_every_generation_are_whole_again_after_a_repair(lab: Lab, root: Path) -> None:
    nodes = builder.build(load(lab.config, ["pairs.draws=3"]))
    runner.run(nodes, "student")
    store = lab.only("pairs")
    damage(store.path, "flipped")
    repair_store(store)
    runner.run(builder.build(load(lab.config)), "pairs")
    runner.run(builder.build(load(lab.config, ["pairs.draws=3"])), "pairs")
    found = [finding for result in audit(lab.all("student")) for finding in result.findings]
    assert found == []


def test_only_a_store_is_repaired_and_only_when_nobody_works_on_it(lab: Lab, root: Path) -> None:
    with pytest.raises(ArtifactError, match="is no pair store"):
        repair_store(lab.only("teacher"))
    store = lab.only("pairs")
    damage(store.path, "flipped")
    before = lab.committed()
    with Lock(store.path), pytest.raises(Held):
        repair_store(store)
    assert lab.committed() == before
