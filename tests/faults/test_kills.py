"""SIGKILL at any moment, SIGTERM and SIGINT: a resume completes the store as if nothing had happened."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.faults.conftest import copied
from tests.faults.counts import COUNTS
from tests.faults.harness import Making, actors_of, check_whole, ended, killing
from tests.support.patience import PATIENCE
from tests.support.sizes import FULL

if TYPE_CHECKING:
    from tests.conftest import Lab
    from tests.faults.conftest import Uninterrupted

MOMENTS = 20  # of each executor
IN_A_ROW = 2  # kills before the store is completed and checked
SEEDS = {"serial": 20260309, "ray": 9014, "slurm": 2603}
POINTS = [f"{when}-{what}" for what in ("payload", "index", "commit") for when in ("before", "after")]
POINTS = POINTS if FULL else POINTS[1::2]


def kill_one_of(making: Making, processes: list[subprocess.Popen[str]], rng: np.random.Generator) -> bool:
    """SIGKILL the driver, or one of the tasks, and wait for the others to end; True when it was killed."""
    victim = processes[int(rng.integers(len(processes)))]
    actors = actors_of(victim)
    killed = making.kill(victim)
    for other in processes:
        if other is not victim:
            making.lab.wait(other)
    ended(actors)
    return killed


@pytest.mark.faults
def test_killed_at_random_moments_of_the_whole_run(
    made: Lab, tmp_path: Path, executor: str, uninterrupted: Uninterrupted, request: pytest.FixtureRequest
) -> None:
    """Moments are uniform over an uninterrupted run, every other one over the part of what is left that encodes."""
    cluster = request.getfixturevalue("nodes").environment if executor == "ray" else {}
    digest, rng = uninterrupted(4), np.random.default_rng(SEEDS[executor])
    first = Making(copied(made, tmp_path / "whole"), executor, cluster=cluster)
    begun = time.monotonic()
    processes = first.start()
    started = time.monotonic() - begun
    first.until(1, processes)
    encoding = time.monotonic() - begun - started
    for process in processes:
        first.lab.wait(process)
    whole = time.monotonic() - begun - started

    killed, store = 0, 0
    while killed < MOMENTS:
        store += 1
        assert store < 2 * MOMENTS, f"only {killed} of {store * IN_A_ROW} moments fell into a run"
        making = Making(copied(made, tmp_path / f"store{store}"), executor, cluster=cluster)
        kills = 0
        for number in range(IN_A_ROW):
            processes = making.start()
            left = 1 - making.committed() / 128
            time.sleep(rng.uniform(encoding if number else 0.0, encoding + left * (whole - encoding)))
            kills += kill_one_of(making, processes, rng)
        killed += kills
        making.resume()
        check_whole(making, digest, orphans=kills * making.workers)
        making.lab.close()


SOME = [
    "serial",
    pytest.param("ray", marks=pytest.mark.faults),
    pytest.param("slurm", marks=pytest.mark.faults),
]


@pytest.mark.seconds(30)
@pytest.mark.parametrize("executor", SOME, indirect=True)
def test_killed_before_and_after_payload_index_and_commit(
    bare: Lab, tmp_path: Path, executor: str, uninterrupted: Uninterrupted
) -> None:
    """At each point one process dies, on Ray an actor; the same command is run until nobody dies."""
    making, tokens = Making(bare, executor), {point: tmp_path / point for point in POINTS}
    environment = killing({point: (2, token) for point, token in tokens.items()})
    for _ in range(len(POINTS) + 1):
        before = sum(token.exists() for token in tokens.values())
        codes = [ended_of(making, process) for process in making.start(**environment)]
        deaths = sum(token.exists() for token in tokens.values()) - before
        if executor != "ray":
            assert codes.count(-signal.SIGKILL) == deaths
        if executor == "ray" or not deaths:
            assert set(codes) == {0}
            break
    assert all(token.exists() for token in tokens.values())
    COUNTS.killed[executor] += len(POINTS)
    if executor == "slurm":
        making.resume()
    check_whole(making, uninterrupted(4), orphans=len(POINTS))


def ended_of(making: Making, process: subprocess.Popen[str]) -> int:
    """The exit code of a process that may be killed."""
    process.communicate(timeout=PATIENCE)
    return process.returncode


@pytest.mark.faults
@pytest.mark.parametrize("point", ["before-manifest", "after-manifest"])
def test_killed_before_and_after_the_manifest(
    bare: Lab, tmp_path: Path, executor: str, point: str, uninterrupted: Uninterrupted
) -> None:
    making = Making(bare, executor)
    if executor == "slurm":  # what seals is `nfm run`
        for process in making.start():
            bare.wait(process)
    token = tmp_path / "token"
    process = bare.start(*making.arguments(), **killing({point: (1, token)}))
    assert ended_of(making, process) == -signal.SIGKILL
    COUNTS.killed[executor] += 1
    assert token.exists()
    said = bare.wait(bare.start(*making.arguments())).stderr
    assert ("is up to date" in said.splitlines()[-1]) == (point == "after-manifest")
    check_whole(making, uninterrupted(4), orphans=1)


SIGNALS = [
    ("serial", signal.SIGTERM),
    pytest.param("serial", signal.SIGINT, marks=pytest.mark.faults),
    pytest.param("ray", signal.SIGTERM, marks=pytest.mark.faults),
    pytest.param("ray", signal.SIGINT, marks=pytest.mark.faults),
    pytest.param("slurm", signal.SIGTERM, marks=pytest.mark.faults),
    pytest.param("slurm", signal.SIGINT, marks=pytest.mark.faults),
]


@pytest.mark.parametrize(("executor", "number"), SIGNALS, indirect=["executor"])
def test_sigterm_and_sigint_end_within_10_seconds_with_exit_130(
    bare: Lab, executor: str, number: signal.Signals, uninterrupted: Uninterrupted
) -> None:
    """In the middle of encoding, and a second driver meanwhile is told who holds the store."""
    making = Making(bare, executor)
    processes = making.start()
    making.until(3, processes)
    for process in processes:
        process.send_signal(signal.SIGSTOP)  # so that what follows falls into the middle on any machine
    assert making.committed() < 128
    if executor != "slurm":  # tasks of an array hold nothing: any number of them may work on a store
        refused = bare.wait(bare.start(*making.by("serial").arguments()), exits=1).stderr
        for part in (str(making.store.name), f"process {processes[0].pid}", "is working on it", "wait for it or stop"):
            assert part in refused
    actors = [pid for process in processes for pid in actors_of(process)]
    for process in processes:
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
    making.ended_by_signal(processes)
    ended(actors)
    assert not list(making.store.glob("lock*"))
    assert not list(making.store.glob("manifest*"))
    assert "are committed already" in making.resume()
    check_whole(making, uninterrupted(4), orphans=making.dropped)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_while_workers_still_begin_ends_the_run_within_10_seconds(
    bare: Lab, executor: str, number: signal.Signals, uninterrupted: Uninterrupted
) -> None:
    making = Making(bare, executor)
    processes = making.start()
    for process in processes:
        bare.until(lambda pid=process.pid: list(bare.artifacts.glob(f"pairs/*/events/*-{pid}.jsonl")), process)
    for process in processes:
        process.send_signal(number)
    making.ended_by_signal(processes)
    making.resume()
    check_whole(making, uninterrupted(4), orphans=making.dropped)
