"""Nodes join and leave. Neither the store nor a cluster that is not ours loses anything."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.storage import PairStore
from nfm.storage.format.index import record_keys
from tests.support.patience import PATIENCE, allowed

if TYPE_CHECKING:
    from tests.clusters.ray.conftest import Nodes
    from tests.conftest import Lab

pytestmark = pytest.mark.faults

SCRIPTS = Path(sysconfig.get_path("scripts"))  # of this environment, which need not be the activated one
DRAWS = 30  # of 32 shards each: enough for a node to come and another to go meanwhile
SHARDS = ("pairs.rows_per_shard=8", "pairs.rows_per_block=8", "pairs.batch_size=8", f"pairs.draws={DRAWS}")
RAY = (*SHARDS, "pairs.executor=ray")

OTHER = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False, namespace="others")
class Other:
    def greet(self): return "here"
other = ray.remote(num_cpus=0)(Other).remote()
print(ray.get(other.greet.remote()), flush=True)
for line in sys.stdin: print(ray.get(other.greet.remote()), flush=True)
"""


def store_of(lab: Lab) -> Path:
    """The store with small shards, beside the one that the tiny run made."""
    paths = [path.parent for path in lab.artifacts.glob("pairs/*/spec.json")]
    return next(path for path in paths if '"rows_per_shard": 8' in (path / "spec.json").read_text())


def commits_in(lab: Lab) -> int:
    try:
        return len(list((store_of(lab) / "commits").glob("[a-z]*.json")))  # one that is being written has another name
    except StopIteration:
        return 0


def workers_of(lab: Lab) -> list[str]:
    """The worker of every commit so far, in order, from the events of all processes."""
    lines = [line for path in store_of(lab).glob("events/*.jsonl") for line in path.open()]
    events = sorted((json.loads(line) for line in lines), key=lambda event: event["time"])
    return [event["worker"] for event in events if event["kind"] == "COMMIT"]


def check_whole(lab: Lab, expected: str) -> None:
    """Every key once, the content that an uninterrupted run has, and a clean audit."""
    store = PairStore.open(store_of(lab))
    keys = store.index(["key"])["key"].to_pylist()
    assert len(keys) == len(set(keys)) == DRAWS * store.spec.rows
    assert set(keys) == {key for draw in range(DRAWS) for key in record_keys(draw, range(store.spec.rows))}
    assert store.content_digest == expected
    assert "clean" in lab.nfm("audit", store_of(lab)).stdout


@pytest.fixture(scope="module")
def uninterrupted(made: Lab, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The content digest that the serial executor's store has."""
    lab = type(made)(tmp_path_factory.mktemp("uninterrupted") / "lab")
    shutil.copytree(made.folder, lab.folder)
    lab.run("pairs", *SHARDS)
    return PairStore.open(store_of(lab)).content_digest


def test_nodes_that_come_and_go_cost_only_the_shards_in_hand(
    lab: Lab, uninterrupted: str, start_nodes: Callable[..., Nodes]
) -> None:
    nodes = start_nodes(0)
    driver = lab.start(*lab.arguments("pairs", *RAY), **nodes.environment)
    assert driver.stderr
    told = next(line for line in driver.stderr if "waiting for" in line)
    assert "waiting for 1 Ray actor of 1 CPU each: the cluster has 0 of 0 CPUs free; no node is large enough" in told
    assert commits_in(lab) == 0

    nodes.add("a")
    lab.until(lambda: commits_in(lab) >= 20, driver)
    nodes.add("b")
    lab.until(lambda: len({*workers_of(lab)}) == 2, driver)  # as many actors as the cluster carries
    nodes.remove("a")
    left = commits_in(lab)
    nodes.add("c")
    lab.until(lambda: len({*workers_of(lab)[left + 2 :]}) == 2, driver)
    assert commits_in(lab) < 32 * DRAWS
    done = lab.wait(driver)
    assert "lost Ray actor" in done.stderr
    assert "Token authentication is enabled" not in done.stderr
    assert "(raylet)" not in done.stdout + done.stderr, "Ray's paragraphs would bury ours"
    check_whole(lab, uninterrupted)


def test_a_cluster_that_is_not_ours_is_still_up_afterwards(
    lab: Lab, uninterrupted: str, start_nodes: Callable[..., Nodes]
) -> None:
    nodes = start_nodes(2)
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, nodes.environment["RAY_ADDRESS"]],
        env={**os.environ, **nodes.environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdin
    assert other.stdout
    assert other.stdout.readline() == "here\n"

    driver = lab.start(*lab.arguments("pairs", *RAY), **nodes.environment)
    lab.until(lambda: commits_in(lab) >= 20, driver)
    asked = time.monotonic()
    driver.send_signal(signal.SIGTERM)
    assert "stopped; the same command goes on from here" in lab.wait(driver, exits=130).stderr
    assert time.monotonic() - asked < allowed(10)
    kept = commits_in(lab)
    assert 20 <= kept < 32 * DRAWS
    done = lab.wait(lab.start(*lab.arguments("pairs", *RAY), **nodes.environment))
    assert f"{kept} of {32 * DRAWS} shards are committed already" in done.stderr
    check_whole(lab, uninterrupted)

    other.stdin.write("?\n")
    other.stdin.flush()
    assert other.stdout.readline() == "here\n"
    other.communicate()


def ray_job(nodes: Nodes, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ray job ...` as a user types it; both streams are in its stdout."""
    verb, *others = arguments
    return subprocess.run(
        [str(SCRIPTS / "ray"), "job", verb, "--address", nodes.jobs, *others],
        env={**os.environ, **nodes.environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=PATIENCE,
    )  # fmt: skip


def submit(lab: Lab, nodes: Nodes, *options: str) -> str:
    """`ray job submit` of the command that a user would run, again while the head node is not up; what it printed."""
    nfm = [str(SCRIPTS / "nfm"), *lab.arguments("pairs", *RAY)]
    command = ["env", "--chdir", str(lab.folder), f"NFM_ARTIFACTS={lab.artifacts}", *nfm]
    deadline = time.monotonic() + PATIENCE
    while True:
        done = ray_job(nodes, "submit", *options, "--", *command)
        if done.returncode == 0:
            return done.stdout
        assert "No available agent" in done.stdout, done.stdout
        assert time.monotonic() < deadline, done.stdout
        time.sleep(1)


def test_a_submitted_job_that_was_stopped_goes_on_when_it_is_submitted_again(
    lab: Lab, uninterrupted: str, start_nodes: Callable[..., Nodes]
) -> None:
    nodes = start_nodes(2, "--jobs")
    submit(lab, nodes, "--no-wait", "--submission-id", "first")
    lab.until(lambda: commits_in(lab) >= 20, nodes.process)
    assert "was stopped" in ray_job(nodes, "stop", "first").stdout
    kept = commits_in(lab)
    assert 20 <= kept < 32 * DRAWS
    told = submit(lab, nodes)
    assert f"{kept} of {32 * DRAWS} shards are committed already" in told
    check_whole(lab, uninterrupted)
