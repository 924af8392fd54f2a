"""Who may write what: a lost lock, numbers of generations, digests that do not depend on time, stores from
elsewhere.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nfm.pipeline.artifacts.artifact import Artifact
from nfm.storage import PairStore
from nfm.storage.files import atomic

if TYPE_CHECKING:
    from tests.support.lab import Lab, Process


def halt_between_saves(process: Process, folder: Path) -> None:
    while True:
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)  # until it has stopped
        if not list(folder.glob("part-*")):
            return
        process.send_signal(signal.SIGCONT)


def test_a_driver_that_lost_its_lock_writes_nothing_more_and_says_so(empty: Lab) -> None:
    process = empty.start(*empty.arguments("teacher", "teacher.images=2000000", "teacher.save_every=1000"))
    empty.until(lambda: list(empty.artifacts.glob("teacher/*/checkpoints/0*")), process)
    (checkpoints,) = empty.artifacts.glob("teacher/*/checkpoints")
    lock = checkpoints.with_name("lock.json")
    other = {key: value for key, value in json.loads(lock.read_text()).items() if key != "digest"}
    halt_between_saves(process, checkpoints)
    atomic.write_json(lock, {**other, "id": "0" * 32, "command": "nfm elsewhere", "host": "node7", "pid": 7})
    kept = {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}
    process.send_signal(signal.SIGCONT)
    result = empty.wait(process, exits=1)
    assert "'nfm elsewhere' on node7 (process 7) took this work over" in result.stderr
    assert json.loads(lock.read_text())["id"] == "0" * 32
    assert {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()} == kept
    assert not checkpoints.with_name("manifest.json").exists()


def test_a_repair_leaves_whole_generations_and_their_numbers(lab: Lab) -> None:
    before = PairStore.open(lab.only("pairs").path)
    lab.run("pairs", "pairs.draws=3")
    store = lab.only("pairs").path
    bad = next(store.glob("shards/d002-s00001.*"))
    data = bytearray(bad.read_bytes())
    data[1000] ^= 1
    bad.write_bytes(data)
    lab.nfm("repair", lab.name("pairs"))
    assert [path.name for path in store.glob("manifest.g*.json")] == ["manifest.g0001.json"]
    lab.run("pairs", "pairs.draws=3")
    assert PairStore.open(store).generation == 3
    assert PairStore.open(store, generation=1).content_digest == before.content_digest
    lab.nfm("audit", lab.name("student"))


def test_a_student_finds_its_pairs_again_after_their_repair(lab: Lab) -> None:
    store = lab.only("pairs").path
    (store / "commits" / "d000-s00001.json").unlink()
    lab.nfm("audit", lab.name("student"), exits=1)
    lab.nfm("repair", lab.name("pairs"))
    lab.run("pairs")
    assert [path.name for path in store.glob("manifest.g*.json")] == ["manifest.g0002.json"]
    lab.nfm("audit", lab.name("student"))


def test_an_evaluation_made_again_has_the_same_content(lab: Lab) -> None:
    found = lab.only("evaluate")
    digest = found.manifest()["content_digest"]
    shutil.rmtree(found.path)
    lab.run("evaluate")
    assert lab.only("evaluate").manifest()["content_digest"] == digest


def test_the_serial_executor_changes_no_later_stage(lab: Lab) -> None:
    digest = lab.only("student").manifest()["content_digest"]
    lab.drop("pairs", "student")
    lab.run("student", "pairs.threads=3")
    assert lab.only("student").manifest()["content_digest"] == digest


def test_a_store_with_a_missing_shard_is_not_sealed(lab: Lab) -> None:
    store = lab.only("pairs").path
    for manifest in store.glob("manifest.g*.json"):
        manifest.unlink()
    shard = next(store.glob("shards/d001-s00000.*"))
    shard.unlink()
    result = lab.nfm("pairs", "seal", lab.name("pairs"), exits=1)
    assert shard.name in result.stderr
    assert not list(store.glob("manifest.g*.json"))


def test_a_student_of_a_store_outside_the_artifacts_can_be_audited(lab: Lab, tmp_path: Path) -> None:
    elsewhere = tmp_path / "bought"
    shutil.move(lab.only("pairs").path, elsewhere)
    lab.drop("student")
    lab.nfm("student", "--pairs", elsewhere, "-c", "tiny.toml")
    found = lab.all("student")
    assert len(found) == 1
    assert Artifact(found[0].path).spec["inputs"]["pairs"]["artifact"] == str(elsewhere)
    lab.nfm("audit", found[0].path)
