"""Pairs made by a real Slurm: cancelled, signalled, requeued and split, an array ends where one serial run does."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING

import pytest

from nfm.storage import PairStore
from nfm.storage.format.index import record_keys
from tests.clusters.slurm.conftest import SETS, SHARDS, Site
from tests.support.patience import allowed

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slurm


def check_whole(site: Site, expected: str) -> None:
    """Every key once, the content of a serial run, a clean audit."""
    store = PairStore.open(site.lab.only("pairs").path)
    keys = store.index(["key"])["key"].to_pylist()
    assert len(keys) == len(set(keys))
    assert set(keys) == {key for draw in range(12) for key in record_keys(draw, range(store.spec.rows))}
    assert store.content_digest == expected
    assert "clean" in site.lab.nfm("audit", site.lab.only("pairs").path).stdout


def record(site: Site, title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keep what Slurm and the jobs said of a submission, and show it."""
    states = "\n".join(f"{job:8} {state}" for job, state in site.cluster.states().items())
    logs = sorted((site.newest() / "logs").glob("*.log"))
    said = "\n".join(f"[{path.name}]\n" + "\n".join(path.read_text().splitlines()[-3:]) for path in logs)
    text = f"== {title}: {site.newest().name}, {site.commits()} of {SHARDS} shards ==\n{states}\n{said}\n"
    with (tmp_path / "record.txt").open("a") as file:
        file.write(text)
    with capsys.disabled():
        print(f"\n{text}")


def test_a_task_cancelled_in_the_middle_is_made_up_by_the_next_submission(
    site: Site, serial_digest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = site.submit("--tasks", 3)
    site.cluster.until(lambda: site.commits() >= 30 and site.running(f"{jobs['array-0']}_1"))
    site.cluster.ask("scancel", f"{jobs['array-0']}_1")
    site.ended()
    record(site, "one task cancelled", tmp_path, capsys)
    assert "stopped; the same task goes on from here" in site.log("array-0")
    assert site.cluster.states()[f"{jobs['array-0']}_1"] == "CANCELLED"
    assert SHARDS / 2 < site.commits() < SHARDS
    assert site.cluster.exit_code(jobs["seal"]) == 1
    missing = SHARDS - site.commits()
    assert f"{missing} of {SHARDS} shards are missing" in site.log("seal")
    assert re.search(r"d\d{3}-s\d{5}", site.log("seal"))
    assert not list(site.lab.only("pairs").path.glob("manifest*"))

    again = site.submit("--tasks", 2)
    site.ended()
    record(site, "submitted again", tmp_path, capsys)
    assert f"{missing:,} shards of" in site.log("prepare")
    assert {site.cluster.states()[again[name]] for name in ("prepare", "seal")} == {"COMPLETED"}
    check_whole(site, serial_digest)


def test_an_array_cancelled_as_a_whole_is_made_up_by_the_next_submission(site: Site, serial_digest: str) -> None:
    jobs = site.submit("--tasks", 5)  # more than the node has cores: one waits
    site.cluster.until(lambda: site.commits() >= 30)
    site.cluster.ask("scancel", jobs["array-0"])
    cancelled = time.monotonic()
    site.ended()
    assert time.monotonic() - cancelled < allowed(60)
    assert 30 <= site.commits() < SHARDS
    assert site.cluster.exit_code(jobs["seal"]) == 1
    site.submit("--tasks", 3)
    site.ended()
    check_whole(site, serial_digest)


@pytest.mark.parametrize("cluster", [{"MaxArraySize": 3}], indirect=True)
def test_more_tasks_than_an_array_may_have_go_into_several_arrays(site: Site, serial_digest: str) -> None:
    jobs = site.submit("--tasks", 7)
    assert set(jobs) == {"prepare", "array-0", "array-1", "array-2", "seal"}
    site.ended()
    states = site.cluster.states()
    assert sum(job.startswith(tuple(f"{jobs[f'array-{n}']}_" for n in range(3))) for job in states) == 7
    assert set(states.values()) == {"COMPLETED"}
    said = "".join(site.log(f"array-{number}") for number in range(3))
    assert sorted(re.findall(r"task (\d) of 7 done", said)) == [str(task) for task in range(7)]
    check_whole(site, serial_digest)


def test_sigusr1_finishes_the_shard_in_hand_and_begins_no_other(site: Site) -> None:
    # Shards of some seconds: 256 rows, one at a time.
    sets = ("pairs.rows_per_shard=256", "pairs.rows_per_block=256", "pairs.batch_size=1", "pairs.draws=12")
    jobs = site.submit("--tasks", 1, sets=sets)
    task = f"{jobs['array-0']}_0"
    site.cluster.until(lambda: site.commits() >= 1)
    site.cluster.ask("scancel", "--signal=USR1", "--batch", task)
    signalled, before = time.time(), site.commits()
    site.ended()
    assert site.cluster.exit_code(task) == 130
    assert before < site.commits() < 12
    events = [
        json.loads(line)
        for path in site.lab.only("pairs").path.glob("events/*.jsonl")
        for line in path.read_text().splitlines()
    ]
    late = [event["time"] for event in events if event["kind"] == "COMMIT" and event["time"] > signalled]
    assert len(late) == site.commits() - before == 1
    assert [event["task"] for event in events if event["kind"] == "STOP"] == [0]
    assert f"{12 - site.commits()} of 12 shards are missing" in site.log("seal")


def test_a_requeued_task_goes_on_where_it_was(site: Site, serial_digest: str) -> None:
    jobs = site.submit("--tasks", 2)
    task = f"{jobs['array-0']}_0"
    site.cluster.until(lambda: site.commits() >= 30 and site.running(task))
    site.cluster.ask("scontrol", "requeue", task)
    site.cluster.until(lambda: not site.running(task), 30)
    site.ended()
    assert set(site.cluster.states().values()) == {"COMPLETED"}
    assert re.search(r"[1-9]\d* of them committed already", site.log("array-0"))
    check_whole(site, serial_digest)


def test_a_refused_job_takes_those_before_it_back(site: Site) -> None:
    said = site.submit("--sbatch-seal=--partition=nowhere", exits=1)["message"]
    assert "invalid partition" in said.lower()
    assert "the jobs before it were cancelled" in said
    site.ended()
    assert not list(site.lab.artifacts.glob("pairs/*/commits/*"))


def test_a_ray_cluster_inside_one_job_makes_the_same_pairs(site: Site, serial_digest: str) -> None:
    jobs = site.submit("--ray", "--sbatch=--cpus-per-task=2", sets=(*SETS, "pairs.workers=2"))
    site.ended()
    assert site.cluster.states()[jobs["ray"]] == "COMPLETED", site.log("ray")
    check_whole(site, serial_digest)
