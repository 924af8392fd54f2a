"""Ray: an actor is killed in the middle of a shard, a whole node goes and another comes; the driver goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faults.counts import COUNTS
from tests.faults.harness import Making, actors_of, check_whole, killing

if TYPE_CHECKING:
    from tests.clusters.ray.conftest import Nodes
    from tests.conftest import Lab
    from tests.faults.conftest import Uninterrupted

LONG = 12  # draws of runs that must not end before a node was lost and another one came


@pytest.mark.long
def test_an_actor_killed_in_the_middle_of_a_shard_is_replaced(
    bare: Lab, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    making, token = Making(bare, "ray"), tmp_path / "token"
    process = making.start(**killing({"before-payload": (3, token)}))[0]
    said = bare.wait(process).stderr
    assert token.exists()
    COUNTS.killed["ray"] += 1
    assert "done in" in said
    check_whole(making, uninterrupted(4), orphans=1)


@pytest.mark.faults
def test_actors_killed_at_random_moments_are_replaced(bare: Lab, uninterrupted: Uninterrupted) -> None:
    making = Making(bare, "ray", LONG)
    process, killed = making.start()[0], 0
    for commits in (1, 60, 120, 180):
        making.until(commits, [process])
        for pid in actors_of(process)[:1]:
            os.kill(pid, signal.SIGKILL)
            killed += 1
            COUNTS.killed["ray"] += 1
    assert killed == 4
    assert "done in" in bare.wait(process).stderr
    check_whole(making, uninterrupted(LONG), orphans=killed)


@pytest.mark.faults
def test_a_node_taken_away_and_another_added(bare: Lab, nodes: Nodes, uninterrupted: Uninterrupted) -> None:
    """One of two nodes is killed; what was in flight there is made on the other one and on the node that comes."""
    making = Making(bare, "ray", LONG, cluster=nodes.environment)
    process = making.start()[0]
    making.until(20, [process])
    nodes.remove("a")
    COUNTS.killed["ray"] += 1
    at = making.committed()
    nodes.add("c")
    assert at < making.shards
    assert "done in" in bare.wait(process).stderr
    check_whole(making, uninterrupted(LONG), orphans=2)


@pytest.mark.faults
def test_all_nodes_lost_and_one_added_later(bare: Lab, nodes: Nodes, uninterrupted: Uninterrupted) -> None:
    """For a while nobody can encode: the driver waits, says so, and goes on."""
    making = Making(bare, "ray", LONG, cluster=nodes.environment)
    process = making.start()[0]
    making.until(20, [process])
    for name in "ab":
        nodes.remove(name)
        COUNTS.killed["ray"] += 1
    assert process.stderr
    assert next(line for line in process.stderr if "waiting for" in line)
    assert making.committed() < making.shards
    nodes.add("c")
    bare.wait(process)
    check_whole(making, uninterrupted(LONG), orphans=4)
