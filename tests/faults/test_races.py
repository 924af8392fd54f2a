"""Two workers or drivers at once: one commit for each shard, one driver for each store; a suspended driver stops
itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faults.counts import COUNTS
from tests.faults.harness import Making, check_whole, meeting

if TYPE_CHECKING:
    from tests.conftest import Lab
    from tests.faults.conftest import Uninterrupted


POINTS = ["before-commit"] + [
    pytest.param(point, marks=pytest.mark.faults)
    for point in ("before-payload", "after-payload", "before-index", "after-index")
]


@pytest.mark.seconds(30)
@pytest.mark.parametrize("point", POINTS)
def test_the_same_shard_encoded_twice_at_once_has_one_commit_and_the_loser_leaves_nothing(
    bare: Lab, tmp_path: Path, point: str, uninterrupted: Uninterrupted
) -> None:
    """Two tasks with the same number wait for each other at `point` of every shard, then race."""
    making = Making(bare, "slurm")
    file, arrivals = making.plan(), tmp_path / "arrivals"
    environment = meeting(point, 2, arrivals)
    for process in [making.task(file, 0, 1, **environment) for _ in range(2)]:
        bare.wait(process)
    met = Counter(path.stem for path in arrivals.iterdir())
    assert len(met) == 128
    assert sum(count == 2 for count in met.values()) > 100, "the two did not race"
    making.seal()
    check_whole(making, uninterrupted(4))


@pytest.mark.faults
def test_many_tasks_at_once_two_of_them_with_the_same_number(bare: Lab, uninterrupted: Uninterrupted) -> None:
    making = Making(bare, "slurm")
    file = making.plan()
    for process in [making.task(file, number, 4) for number in (0, 1, 2, 3, 1)]:
        bare.wait(process)
    making.seal()
    check_whole(making, uninterrupted(4))


@pytest.mark.faults
def test_tasks_beside_a_driver_make_one_store(bare: Lab, uninterrupted: Uninterrupted) -> None:
    """Encoders need no lock: an array and a driver that work on one store at once do each shard once or drop it."""
    making = Making(bare, "slurm")
    file = making.plan()
    driver = making.by("serial").start()
    tasks = [making.task(file, number, 2) for number in range(2)]
    for process in [*driver, *tasks]:
        bare.wait(process)
    check_whole(making, uninterrupted(4))


@pytest.fixture
def elsewhere(bare: Lab) -> list[str]:
    """A command line's beginning that makes what follows look like another machine's process: another namespace."""
    command = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no process namespaces can be made here (needs root and unshare of util-linux)")
    return command


@pytest.mark.faults
@pytest.mark.parametrize("executor", ["serial", "ray"], indirect=True)
def test_a_driver_that_stood_still_while_another_took_over_stops_without_damage(
    bare: Lab, executor: str, elsewhere: list[str], uninterrupted: Uninterrupted
) -> None:
    making = Making(bare, executor, draws=8)
    stopped = making.start()[0]
    making.until(3, [stopped])
    stopped.send_signal(signal.SIGSTOP)
    assert making.committed() < making.shards
    nfm = str(Path(sysconfig.get_path("scripts")) / "nfm")
    other = subprocess.Popen(
        [*elsewhere, nfm, *making.by("serial").arguments()],
        cwd=bare.folder,
        env={**os.environ, "NFM_ARTIFACTS": str(bare.artifacts)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    bare.started.append(other)
    assert "done in" in bare.wait(other).stderr
    COUNTS.resumed["serial"] += 1
    files = bare.committed()
    stopped.send_signal(signal.SIGCONT)
    said = bare.wait(stopped, exits=1).stderr
    assert "took this work over while this process stood still" in said
    assert bare.committed() == files
    check_whole(making, uninterrupted(8))
