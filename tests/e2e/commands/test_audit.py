"""The audit as a user runs it: clean after a run, exit 1 with the file's name after one byte changed, then repair."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from nfm.pipeline.artifacts.artifact import Artifact
from nfm.storage.files import atomic
from nfm.storage.format.spec import read_spec
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.shard_writer import write_shard
from nfm.storage.store import PairStore

if TYPE_CHECKING:
    from tests.conftest import Lab


def flip(path: Path, at: float = 0.5) -> None:
    """Flip one bit of the byte at this fraction of the file."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)


def findings(done: Any) -> list[dict[str, str]]:
    return [finding for result in json.loads(done.stdout) for finding in result["findings"]]


def test_a_generation_that_another_program_sealed_is_neither_used_nor_called_clean(lab: Lab) -> None:
    store = lab.only("pairs").path
    seal.seal(store, 1)  # without what the stage says of itself
    manifest = store / "manifest.g0002.json"
    (found,) = findings(lab.nfm("audit", manifest, "--json", exits=1))
    assert found["file"] == str(manifest)
    assert found["problem"] == "the pairs stage did not seal it: it has no fingerprint, no config, no files"
    told = lab.run("pairs", "pairs.draws=1", exits=1).stderr
    assert f"{manifest}: the pairs stage did not seal it; move the store away" in told
    shown = lab.nfm("status", "-c", "tiny.toml", "--set", "pairs.draws=1", "--json").stdout
    assert {row["stage"]: row["state"] for row in json.loads(shown)}["pairs"] == "damaged"
    assert "up to date (pairs 512" in lab.run("pairs").stderr


@pytest.mark.parametrize("level", ["--quick", None, "--deep"])
def test_a_fresh_run_is_clean_at_every_level_and_keeps_receipts(lab: Lab, level: str | None) -> None:
    before = lab.committed()
    done = lab.nfm("audit", "-c", "tiny.toml", *([level] if level else []))
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert len(lines) == 9
    assert all(line.split()[1] == "clean" for line in lines)
    name = (level or "--default").removeprefix("--")
    for stage in ("data", "features", "teacher", "pairs", "student", "evaluate", "report"):
        for artifact in lab.all(stage):
            receipts = list((artifact.path / "audits").glob(f"*-{name}.json"))
            assert len(receipts) == 1
            assert atomic.read_json(receipts[0])["findings"] == []
    assert lab.committed() == before
    statements = [line for line in done.stdout.splitlines() if line.startswith(" ")]
    if level == "--deep":
        assert len(statements) == 2
        assert all("0 of 300 pairs bad: at most 1.00% with 95 % confidence" in line for line in statements)
    else:
        assert not statements


def test_json_says_the_same_to_machines(made: Lab) -> None:
    store = made.only("pairs")
    results = json.loads(made.nfm("audit", store.path, "--json").stdout)
    assert [result["artifact"].split("/")[0] for result in results] == ["data", "teacher", "pairs"]
    assert results[-1]["artifact"] == made.name("pairs")
    assert results[-1]["manifest"] == "manifest.g0001.json"
    assert all(result["findings"] == [] for result in results)


def test_one_flipped_byte_of_a_shard_is_found_repaired_and_encoded_again_the_same(lab: Lab) -> None:
    store = lab.only("pairs")
    body = store.manifest()
    bad = store.path / body["shards"][5]["payload"]
    flip(bad, 0.7)
    before = lab.committed()
    done = lab.nfm("audit", "-c", "tiny.toml", exits=1)
    assert "FINDING" in done.stdout
    assert str(bad) in done.stdout
    assert lab.nfm("pairs", "verify", store.path, exits=1).stdout.startswith(str(bad))
    assert lab.committed() == before
    lab.nfm("audit", store.path, "--quick")  # sizes only: that level does not see it

    assert "set aside: 1" in lab.nfm("repair", store.path).stdout
    assert lab.committed().items() >= {path: sha for path, sha in before.items() if "manifest" not in path
                                       and body["shards"][5]["name"] not in path}.items()  # fmt: skip
    assert list((store.path / "quarantine").rglob(bad.name))
    assert "7 of 8 shards are committed already" in lab.run("pairs").stderr
    assert lab.only("pairs").manifest()["content_digest"] == body["content_digest"]
    assert "FINDING" not in lab.nfm("audit", "-c", "tiny.toml").stdout
    assert "nothing to repair" in lab.nfm("repair", store.path).stdout


def test_a_damaged_file_of_an_input_is_told_with_that_input_alone(lab: Lab) -> None:
    dataset, store = lab.only("data").path / "dataset.json", lab.name("pairs", "independent")
    dataset.write_text(dataset.read_text().replace("digits", "digitz"))
    results = json.loads(lab.nfm("audit", store, "--json", exits=1).stdout)
    assert [result["artifact"] for result in results] == [lab.name("data"), store]
    assert {finding["file"] for finding in results[0]["findings"]} == {str(dataset)}
    assert results[1]["findings"] == []


def test_any_artifact_can_be_named_by_the_start_of_its_fingerprint(made: Lab) -> None:
    teacher = made.only("teacher")
    assert made.name("teacher") in made.nfm("audit", teacher.path.name[:6]).stdout
    told = made.nfm("audit", "no-such-artifact", exits=2).stderr
    assert "no artifact no-such-artifact" in told
    assert "nfm ls" in told
    made.nfm("audit", exits=2)
    made.nfm("audit", teacher.path, "-c", "tiny.toml", exits=2)


FILES = {
    "data shard": ("data", "train/s00000.tar"),
    "data set": ("data", "dataset.json"),
    "teacher weights": ("teacher", "weights.safetensors"),
    "teacher facts": ("teacher", "teacher.json"),
    "teacher manifest": ("teacher", "manifest.json"),
    "teacher spec": ("teacher", "spec.json"),
    "data manifest": ("data", "manifest.json"),
    "pairs spec": ("pairs", "spec.json"),
    "pairs manifest": ("pairs", "manifest.g0001.json"),
    "pairs commit": ("pairs", "commits/d000-s00001.json"),
    "pairs index": ("pairs", "index/d001-s00002.*.parquet"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_flipped_byte_anywhere_is_a_finding_of_the_config_and_of_the_artifact(lab: Lab, what: str) -> None:
    stage, pattern = FILES[what]
    store = lab.only("pairs")
    path = next(lab.only(stage).path.glob(pattern))
    flip(path)
    before = lab.committed()
    named = findings(lab.nfm("audit", store.path, "--json", exits=1))
    assert any(finding["file"] == str(path) or str(path) in finding["problem"] for finding in named), named
    assert all(finding["remedy"] for finding in named)
    whole = findings(lab.nfm("audit", "-c", "tiny.toml", "--json", exits=1))
    assert any(finding["file"] == str(path) or str(path) in finding["problem"] for finding in whole), whole
    assert lab.committed() == before


def test_a_missing_and_a_truncated_file_are_found_by_the_quick_level(lab: Lab) -> None:
    store, weights = lab.only("pairs"), lab.only("student").path / "weights.safetensors"
    shard = store.path / store.manifest()["shards"][0]["payload"]
    shard.unlink()
    weights.write_bytes(weights.read_bytes()[:1000])
    told = lab.nfm("audit", "-c", "tiny.toml", "--quick", exits=1).stdout
    assert f"{shard}: the file is missing" in told
    assert f"{weights}: 1000 bytes" in told


def swap_noise(store: Artifact, draw: int, shard: int) -> None:
    """Give one shard other, perfectly valid noise, with every digest and commit consistent and sealed anew."""
    root, spec, body = store.path, read_spec(store.path), store.manifest()
    slots = np.array(spec.slots_of(shard))
    records = PairStore.open(root).gather(draw, slots)
    index = PairStore.open(root).index(draw=draw).slice(slots[0], len(slots))
    rng = np.random.default_rng(7)
    records = {
        **{name: np.array(values) for name, values in records.items()},
        "noise": rng.standard_normal(records["noise"].shape, np.float32),
        "flip": index["flip"].to_numpy(zero_copy_only=False),
        "nll": index["nll"].to_numpy(),
    }
    name = body["shards"][draw * spec.shards_per_draw + shard]["name"]
    for path in root.glob(f"*/{name}.*"):
        path.unlink()
    commits.publish(root, write_shard(root, spec, draw, shard, "forged", [records]))
    store.path.joinpath(store.manifest_name).unlink()
    made = {*seal.build(root, spec, body["draws"]), "digest"}
    seal.seal(root, body["draws"], **{key: value for key, value in body.items() if key not in made})


def test_noise_of_another_teacher_is_found_by_the_deep_level_alone(lab: Lab) -> None:
    store = lab.only("pairs")
    swap_noise(store, draw=1, shard=2)
    lab.nfm("audit", store.path)  # as a set of files it is whole
    done = lab.nfm("audit", store.path, "--deep", "--json", exits=1)
    found = findings(done)
    assert found
    assert all("d001-s00002.forged" in finding["file"] for finding in found)
    statement = json.loads(done.stdout)[-1]["statements"][0]
    assert f"{len(found)} of 300 pairs bad" in statement
    assert 20 <= len(found) <= 64  # 64 of 512 records are forged, 300 are looked at


def test_a_teacher_swapped_after_the_pairs_were_made_is_found(lab: Lab) -> None:
    store, teacher = lab.only("pairs"), lab.only("teacher")
    lab.run("teacher", "teacher.seed=5", "teacher.images=640")
    other = next(artifact for artifact in lab.all("teacher") if artifact.path != teacher.path)
    shutil.rmtree(teacher.path)
    shutil.copytree(other.path, teacher.path)
    told = lab.nfm("audit", store.path, exits=1).stdout
    assert "the fingerprint is not the one of its spec and folder" in told
    assert f"teacher/{teacher.path.name}, holds other content than was read" in told


def test_a_config_with_nothing_made_says_how_to_begin(empty: Lab) -> None:
    told = empty.nfm("audit", "-c", "tiny.toml", exits=1).stderr
    assert "nothing of this config is made yet; start with `nfm run pairs" in told


@pytest.mark.parametrize("how", ["flipped", "swapped"])
def test_damaged_data_are_not_made_into_anything_and_what_was_made_of_them_before_is_not_blamed(
    lab: Lab, how: str
) -> None:
    data, store = lab.only("data"), lab.only("pairs")
    first, second = sorted((data.path / "train").iterdir())[:2]
    before = first.read_bytes()
    if how == "flipped":
        flip(first)
    else:
        first.write_bytes(second.read_bytes())
    made = len(lab.all("pairs"))
    for target in (["run", "pairs", "-c", "tiny.toml", "--set", "pairs.seed=5"],
                   ["run", "teacher", "-c", "tiny.toml", "--set", "teacher.seed=5"],
                   ["pairs", "worklist", "-c", "tiny.toml", "--set", "pairs.seed=5", "-o", "list.json"]):  # fmt: skip
        done = lab.nfm(*target, exits=1)
        assert str(first) in done.stderr, done.stderr
        assert "restore the file from a copy, or remove the artifact's folder" in done.stderr
    assert not list(lab.folder.glob("list.json"))
    assert len(lab.all("pairs")) == made
    results = {one["artifact"]: one for one in json.loads(lab.nfm("audit", store.path, "--json", exits=1).stdout)}
    assert [finding["file"] for finding in results[lab.name("data")]["findings"]] == [str(first)]
    assert results[lab.name("pairs")]["findings"] == []
    assert results[lab.name("pairs")]["statements"] == [
        f"not compared with {lab.name('data')}: mend the findings there, and audit again"
    ]
    first.write_bytes(before)
    assert "FINDING" not in lab.nfm("audit", store.path).stdout
