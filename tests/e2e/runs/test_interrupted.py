"""Killed or stopped at any moment and run again, a stage ends as if nothing had happened."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from nfm.pipeline.artifacts.artifact import Artifact
from nfm.storage import PairStore
from nfm.storage.format.index import record_keys
from tests.faults.harness import actors_of, ended

if TYPE_CHECKING:
    from tests.conftest import Lab

DRAWS = 4
SMALL_SHARDS = ("pairs.rows_per_shard=8", "pairs.rows_per_block=8", "pairs.batch_size=8", f"pairs.draws={DRAWS}")
RAY = ("pairs.executor=ray", "pairs.workers=2")


def store_in_making(lab: Lab) -> Path:
    """The store with small shards, beside the one that the tiny run made."""
    return next(store.path for store in lab.all("pairs") if store.spec["store"]["rows_per_shard"] == 8)


def commits_in(lab: Lab) -> int:
    """How many small shards are committed so far."""
    folders = [
        path.parent for path in lab.artifacts.glob("pairs/*/spec.json") if '"rows_per_shard": 8' in path.read_text()
    ]
    return len(list(folders[0].glob("commits/d*.json"))) if folders else 0


def kill_at(lab: Lab, process: subprocess.Popen[str], commits: int, pause: float) -> None:
    """SIGKILL the command `pause` seconds after this many commits stand."""
    lab.until(lambda: commits_in(lab) >= commits, process)
    time.sleep(pause)
    process.kill()
    process.communicate()


def check_whole(lab: Lab, expected: str) -> None:
    """Every key once, the content that an uninterrupted run has, and a clean audit."""
    found = store_in_making(lab)
    store = PairStore.open(found)
    rows = store.spec.rows
    keys = store.index(["key"])["key"].to_pylist()
    assert len(keys) == len(set(keys)) == DRAWS * rows
    assert set(keys) == {key for draw in range(DRAWS) for key in record_keys(draw, range(rows))}
    for draw in range(DRAWS):
        np.testing.assert_array_equal(store.gather(draw, np.arange(rows))["slot"], np.arange(rows))
    assert store.content_digest == expected
    assert "clean" in lab.nfm("audit", found).stdout


@pytest.fixture(scope="module")
def uninterrupted(made: Lab, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The content digest of the store with small shards when nothing gets in the way."""
    lab = type(made)(tmp_path_factory.mktemp("uninterrupted") / "lab")
    shutil.copytree(made.folder, lab.folder)
    lab.run("pairs", *SMALL_SHARDS)
    return PairStore.open(store_in_making(lab)).content_digest


@pytest.mark.ray  # a small machine starts one local Ray at a time
@pytest.mark.long
def test_a_killed_ray_driver_takes_its_actors_along_and_costs_nothing(lab: Lab, uninterrupted: str) -> None:
    first = lab.start(*lab.arguments("pairs", *SMALL_SHARDS, *RAY))
    lab.until(lambda: len(actors_of(first)) == 2, first)
    actors = actors_of(first)
    kill_at(lab, first, 7, 0.003)
    assert 7 <= commits_in(lab) < 128
    ended(actors)
    assert "done in" in lab.run("pairs", *SMALL_SHARDS).stderr  # another executor goes on
    check_whole(lab, uninterrupted)


TEACHER = ("teacher.images=9600", "teacher.log_every=640")
STUDENT = ("student.pairs=9600", "student.save_every=640", "student.log_every=640")


def lines_of(lab: Lab, stage: str, others: set[Path]) -> int:
    """How many lines the metrics of the run in the making have."""
    found = [path for path in (lab.artifacts / stage).glob("*/metrics.jsonl") if path.parent not in others]
    return found[0].read_text().count("\n") if found else 0


def trained_alone(lab: Lab, stage: str, *sets: str) -> tuple[set[Path], bytes, str]:
    """(older artifacts, final weights, content digest) of an uninterrupted training, which is then removed."""
    others = {artifact.path for artifact in lab.all(stage)}
    lab.run(stage, *sets)
    own = next(artifact for artifact in lab.all(stage) if artifact.path not in others)
    weights, digest = (own.path / "weights.safetensors").read_bytes(), own.manifest()["content_digest"]
    shutil.rmtree(own.path)
    return others, weights, digest


def finish(lab: Lab, stage: str, others: set[Path], *sets: str) -> Artifact:
    done = lab.run(stage, *sets)
    assert f"{stage}: resuming" in done.stderr
    assert "continuing from" in done.stderr
    return next(artifact for artifact in lab.all(stage) if artifact.path not in others)


def stop(lab: Lab, process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)
    told = lab.wait(process, exits=130)
    assert "stopped; the same command goes on from here" in told.stderr


def test_a_teacher_stopped_by_sigterm_ends_bit_for_bit_the_same(lab: Lab) -> None:
    others, weights, digest = trained_alone(lab, "teacher", *TEACHER)
    process = lab.start(*lab.arguments("teacher", *TEACHER))
    lab.until(lambda: lines_of(lab, "teacher", others) >= 2, process)
    stop(lab, process, signal.SIGTERM)
    stopped = [artifact for artifact in lab.all("teacher") if artifact.path not in others]
    assert [artifact.done for artifact in stopped] == [False]
    own = finish(lab, "teacher", others, *TEACHER)
    assert (own.path / "weights.safetensors").read_bytes() == weights
    assert own.manifest()["content_digest"] == digest
    seen = [line.split('"images_seen": ')[1].split(",")[0] for line in (own.path / "metrics.jsonl").open()]
    assert len(seen) == len(set(seen)) == 15


def test_a_student_stopped_by_sigint_and_then_killed_ends_bit_for_bit_the_same(lab: Lab) -> None:
    others, weights, digest = trained_alone(lab, "student", *STUDENT)
    process = lab.start(*lab.arguments("student", *STUDENT))
    lab.until(lambda: lines_of(lab, "student", others) >= 3, process)
    stop(lab, process, signal.SIGINT)
    process = lab.start(*lab.arguments("student", *STUDENT))
    lab.until(lambda: lines_of(lab, "student", others) >= 8, process)
    process.kill()
    process.communicate()
    own = finish(lab, "student", others, *STUDENT)
    assert (own.path / "weights.safetensors").read_bytes() == weights
    assert own.manifest()["content_digest"] == digest
    seen = [line.split('"pairs_seen": ')[1].split(",")[0] for line in (own.path / "metrics.jsonl").open()]
    assert len(seen) == len(set(seen)) == 15


def test_pairs_stopped_by_one_signal_or_by_two_keep_what_is_committed(lab: Lab, uninterrupted: str) -> None:
    process = lab.start(*lab.arguments("pairs", *SMALL_SHARDS))
    lab.until(lambda: commits_in(lab) >= 20, process)
    stop(lab, process, signal.SIGTERM)
    process = lab.start(*lab.arguments("pairs", *SMALL_SHARDS))
    lab.until(lambda: commits_in(lab) >= 50, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # the second one does not wait for the work in hand
    lab.wait(process, exits=130)
    assert not (store_in_making(lab) / "lock.json").exists()
    kept = {path: path.read_bytes() for path in store_in_making(lab).glob("commits/d*.json")}
    assert 50 <= len(kept) < 128
    done = lab.run("pairs", *SMALL_SHARDS)
    assert f"{len(kept)} of 128 shards are committed already" in done.stderr
    assert {path: path.read_bytes() for path in kept} == kept
    check_whole(lab, uninterrupted)


def test_an_evaluation_killed_in_the_middle_goes_on_with_the_next_row(lab: Lab) -> None:
    sets = ("evaluate.seed=2",)
    others = {artifact.path for artifact in lab.all("evaluate")}

    def rows() -> list[Path]:
        return [path for path in lab.artifacts.glob("evaluate/*/rows/[a-z]*.json") if path.parents[1] not in others]

    process = lab.start(*lab.arguments("evaluate", *sets))
    lab.until(lambda: len(rows()) >= 3, process)
    process.kill()
    process.communicate()
    kept = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in rows()}
    assert 3 <= len(kept) < 9
    lab.run("evaluate", *sets)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in kept} == kept
    assert len(rows()) == 9
