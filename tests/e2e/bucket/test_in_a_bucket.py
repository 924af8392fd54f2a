"""A run whose artifacts are in a bucket: it makes what a run in a folder makes, from machines that share only that."""

from __future__ import annotations

import json
import re
import signal
from typing import TYPE_CHECKING

import pytest

from nfm.stages.display.watching.lines import read_lines
from nfm.storage import PairStore
from nfm.storage.files.paths import as_path, names_in, remove, size_of
from nfm.storage.verify import verify

if TYPE_CHECKING:
    from tests.conftest import Lab
    from tests.support.buckets.in_bucket import Bucket

NO_REPORT = "pairs.report=false"


@pytest.mark.seconds(60)
def test_machines_that_share_only_a_bucket_make_what_one_makes_in_a_folder(made: Lab, there: Bucket) -> None:
    assert there.run("data").stdout == f"{there.url}/{made.name('data')}\n"
    there.upload(made, "teacher")
    two, three = there.on("two"), there.on("three")
    told = two.run("pairs", NO_REPORT).stderr
    assert "data/" in told
    assert told.count("is up to date") == 2
    assert "student: done" in three.run("student", NO_REPORT).stderr
    for stage in ("data", "pairs", "student"):
        (artifact,) = there.all(stage)
        assert artifact.path.name == made.only(stage).path.name
        assert artifact.manifest()["content_digest"] == made.only(stage).manifest()["content_digest"]
    again = there.run("student", NO_REPORT).stderr
    assert again.count("is up to date") == 4
    assert "making" not in again
    for machine in (there, two, three):
        assert not machine.lab.artifacts.exists()
    assert not list((three.folder / "three" / "scratch").glob("*/pairs/*/shards")), "a store stays where it is"


@pytest.mark.seconds(60)
@pytest.mark.parametrize(
    "s3", ["s3", *(pytest.param(cloud, marks=pytest.mark.long) for cloud in ("gs", "az"))], indirect=True
)
def test_a_machine_that_dies_is_continued_by_another_and_no_pair_is_lost_or_made_twice(
    made: Lab, there: Bucket
) -> None:
    there.upload(made, "data", "teacher")
    dying = there.start(*there.lab.arguments("pairs", NO_REPORT))
    store = as_path(there.url) / made.name("pairs")
    there.lab.until(lambda: len(names_in(store / "commits")) > 2, dying)
    dying.send_signal(signal.SIGKILL)
    dying.communicate()
    before = names_in(store / "commits")
    told = there.on("two").run("pairs", NO_REPORT).stderr
    assert "pairs: resuming" in told
    assert f"{len(before)} of 8 shards are committed already" in told
    assert verify(store, level="default") == []
    finished = PairStore.open(str(store))
    for draw in range(2):
        assert finished.index(["slot"], draw=draw)["slot"].to_pylist() == list(range(256))


@pytest.mark.long
@pytest.mark.seconds(120)
@pytest.mark.parametrize("s3", ["gs", "az"], indirect=True)
def test_other_clouds_hold_a_run_from_nothing_to_samples(made: Lab, there: Bucket) -> None:
    there.run("student", NO_REPORT)
    name = f"student/{there.all('student')[0].path.name}"
    two = there.on("two")
    two.nfm("sample", name, "-n", "4", "-o", "grid.png")
    assert (two.lab.folder / "grid.png").exists()
    assert [row["state"] for row in json.loads(two.nfm("ls", "--json").stdout)] == ["done"] * 4
    status = json.loads(two.nfm("status", "-c", "tiny.toml", "--json").stdout)
    assert {row["state"] for row in status if row["stage"] in ("data", "teacher", "pairs", "student")} == {"done"}
    assert two.nfm("audit", name, "--deep").stdout.count(" clean ") == 4
    assert "nothing" in two.nfm("gc", "-c", "tiny.toml", "--yes").stdout
    (pairs,) = there.all("pairs")
    assert pairs.manifest()["content_digest"] == made.only("pairs").manifest()["content_digest"]


@pytest.mark.seconds(60)
def test_a_training_whose_machine_is_gone_goes_on_from_its_checkpoint_on_another(made: Lab, there: Bucket) -> None:
    there.upload(made, "data", "teacher", "pairs")
    dying = there.start(*there.lab.arguments("student", "student.save_every=512"))
    student = as_path(there.url) / "student" / made.only("student").path.name
    states = student / "resume"
    there.lab.until(lambda: any(size_of(states / name / "files.json") for name in names_in(states)), dying)
    dying.send_signal(signal.SIGKILL)
    dying.communicate()
    told = there.on("two").run("student", "student.save_every=512").stderr
    assert "student: resuming" in told
    assert "continuing from " in told
    (finished,) = there.all("student")
    assert finished.manifest()["content_digest"] == made.only("student").manifest()["content_digest"]
    assert names_in(student / "resume") == []
    seen = [line["pairs_seen"] for line in read_lines(finished.readable / "metrics.jsonl")]
    assert seen == [line["pairs_seen"] for line in read_lines(made.only("student").path / "metrics.jsonl")]


@pytest.mark.seconds(60)
def test_what_looks_at_artifacts_says_the_same_of_a_bucket_as_of_a_folder(made: Lab, there: Bucket) -> None:
    there.upload(made, "data", "teacher", "pairs", "student")
    name = made.name("student")
    assert there.nfm("lineage", name).stdout == made.nfm("lineage", name).stdout
    listed = {row["artifact"]: row for row in json.loads(there.nfm("ls", "--json").stdout)}
    for stage in ("data", "teacher"):
        assert listed[made.name(stage)]["state"] == "done"
        assert made.name("pairs") in listed[made.name(stage)]["needed by"]
    status = {row["stage"]: row for row in json.loads(there.nfm("status", "-c", "tiny.toml", "--json").stdout)}
    here = {row["stage"]: row for row in json.loads(made.nfm("status", "-c", "tiny.toml", "--json").stdout)}
    for stage in ("data", "teacher", "pairs", "student"):
        assert status[stage] | {"size": ""} == here[stage] | {"size": ""}
    there.nfm("sample", name, "-n", "4", "-o", "grid.png")
    assert (there.lab.folder / "grid.png").exists()


@pytest.mark.seconds(60)
def test_an_audit_of_a_bucket_reads_the_bucket_and_not_what_is_here(made: Lab, there: Bucket) -> None:
    there.upload(made, "data", "teacher", "pairs")
    store = as_path(there.url) / made.name("pairs")
    before = len(names_in(store / "audits"))
    for level in ("--quick", "--deep"):
        told = there.nfm("audit", made.name("pairs"), level).stdout
        assert told.count(" clean ") == 3
        assert "FINDING" not in told
    assert "0 of 300 pairs bad" in told
    assert len(names_in(store / "audits")) == before + 2
    weights = as_path(there.url) / made.name("teacher") / "weights.safetensors"
    weights.write_bytes(b"0" * (size_of(weights) or 0))
    shard = store / "shards" / names_in(store / "shards")[3]
    remove(shard)
    told = there.nfm("audit", made.name("pairs"), exits=1).stdout
    assert f"{weights}: its SHA-256 is not the manifest's" in told
    assert f"{shard}: " in told
    assert f"not compared with {made.name('teacher')}: mend the findings there" in told
    assert f"{weights}: SHA-256" in there.on("two").run("pairs", NO_REPORT, "pairs.draws=3", exits=1).stderr


@pytest.mark.seconds(60)
def test_commands_about_stores_find_their_makers_in_the_bucket(made: Lab, there: Bucket) -> None:
    there.upload(made, "data", "teacher", "pairs")
    name = made.name("pairs")
    store = f"{there.url}/{name}"
    assert "not found" not in there.nfm("pairs", "report", name).stderr
    assert "nothing is decoded" not in there.nfm("pairs", "head", name[:12], "-n", "2").stderr
    assert there.nfm("pairs", "info", name, "--json").stdout == made.nfm("pairs", "info", name, "--json").stdout
    assert "clean" in there.nfm("pairs", "verify", store).stdout
    told = json.loads(there.nfm("plan", "pairs", "-c", "tiny.toml", "--json").stdout)
    assert {row["would"] for row in told} == {"nothing, is done"}


@pytest.mark.seconds(60)
def test_tasks_of_an_array_share_a_list_and_a_bucket(made: Lab, there: Bucket) -> None:
    there.upload(made, "data", "teacher")
    told = there.nfm("submit", "pairs", "-c", "tiny.toml", "--slurm").stdout
    (where,) = set(re.findall(rf"{there.url}/submissions/\S+/worklist.json", told))
    assert names_in(as_path(there.url)) == ["data", "teacher"], "printing scripts writes nothing"
    there.nfm("pairs", "worklist", "-c", "tiny.toml", "-o", where, "--set", "pairs.executor=slurm")
    for task in range(2):
        there.on(f"task{task}").nfm("pairs", "encode", where, "--task", task, "--of", 2)
    there.run("pairs", NO_REPORT, "pairs.executor=slurm")
    (store,) = there.all("pairs")
    assert store.manifest()["content_digest"] == made.only("pairs").manifest()["content_digest"]
    assert len(names_in(store.path / "events")) == 3


@pytest.mark.seconds(60)
def test_a_repair_in_a_bucket_moves_bad_shards_aside_and_the_next_run_makes_them_again(
    made: Lab, there: Bucket
) -> None:
    there.upload(made, "data", "teacher", "pairs")
    store = as_path(there.url) / made.name("pairs")
    shards = names_in(store / "shards")
    bad = store / "shards" / shards[2]
    bad.write_bytes(b"0" * (size_of(bad) or 0))
    told = there.nfm("repair", made.name("pairs")).stdout
    assert "set aside: 1" in told
    (aside,) = names_in(store / "quarantine")
    assert names_in(store / "quarantine" / aside / "shards") == [shards[2]]
    assert len(names_in(store / "commits")) == len(shards) - 1
    there.on("two").run("pairs", NO_REPORT)
    assert verify(store, level="default") == []
    assert "manifest.g0002.json" in names_in(store)
    assert PairStore.open(str(store)).content_digest == PairStore.open(made.only("pairs").path).content_digest
    assert "nothing to repair" in there.nfm("repair", made.name("pairs")).stdout
