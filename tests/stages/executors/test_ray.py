"""The Ray executor on one node: a lost actor costs only its attempt, and waiting is always reported."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.stages.base import StageError, Unfit
from nfm.stages.encoding.encoder import Setup
from nfm.stages.executors import ray as on_ray
from nfm.stages.executors.jobs import Job
from tests.clusters.ray.shards import NAMES, Assassin, Switch, bare, committed, digests, ended, jobs, serially
from tests.support.patience import allowed

pytestmark = [pytest.mark.ray, pytest.mark.seconds(30)]  # a small machine starts one Ray at a time

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.fixture
def prepared(made: Lab, tmp_path: Path) -> Setup:
    return bare(made, tmp_path / "store")


class Other:
    """Somebody else's actor."""

    def greet(self) -> str:
        return "here"


def test_a_local_ray_listens_on_the_loopback_address_alone(cluster: None) -> None:
    import psutil
    import ray

    other = ray.remote(num_cpus=1)(Other).remote()  # a worker listens too
    assert ray.get(other.greet.remote()) == "here"
    heard: dict[str, set[str]] = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            found = process.net_connections(kind="inet")
            heard.setdefault(process.name(), set()).update(one.laddr.ip for one in found if one.status == "LISTEN")
    addresses = {ipaddress.ip_address(text.removeprefix("::ffff:")) for texts in heard.values() for text in texts}
    assert all(address.is_loopback for address in addresses), heard
    assert heard["gcs_server"], heard
    assert heard["raylet"], heard
    assert heard["ray::Other"], heard


def test_an_actor_killed_in_the_middle_of_a_shard_costs_only_that_attempt(
    prepared: Setup, made: Lab, tmp_path: Path, cluster: None
) -> None:
    heard: list[str] = []
    with Assassin(prepared, NAMES[2], times=1) as assassin:
        outcomes = ended(on_ray.run(prepared, jobs(), 2, Switch(), say=heard.append))
    assert assassin.kills == 1
    assert committed(outcomes) == NAMES
    assert digests(prepared) == serially(made, tmp_path / "serial")
    assert [outcome.job.name for outcome in outcomes if outcome.job.deaths] == [NAMES[2]]
    assert sum(text.startswith("the first Ray actor is ready after ") for text in heard) == 1
    assert sum(text.startswith("lost Ray actor ") for text in heard) == 1


def test_jobs_are_drawn_as_needed_and_a_stop_leaves_other_peoples_actors_alone(prepared: Setup, cluster: None) -> None:
    import ray

    other = ray.remote(num_cpus=1)(Other).remote()
    drawn: list[Job] = []
    plenty = (drawn.append(job) or job for _ in range(25_000) for job in jobs())
    switch, outcomes, asked = Switch(), [], 0.0
    for outcome in on_ray.run(prepared, plenty, 2, switch):
        if outcome:
            outcomes.append(outcome)
            if len(outcomes) == 8:
                switch.stopping, asked = True, time.monotonic()
    assert time.monotonic() - asked < allowed(10)
    assert len(outcomes) == 8
    assert len(drawn) <= 8 + 2 * (2 + 3)  # in flight, and those that wait
    assert {outcome.worker.rpartition("/")[2] for outcome in outcomes} <= {"0", "1"}
    assert all(outcome.timing and 0 < outcome.timing.encode <= outcome.timing.wall for outcome in outcomes)
    assert ray.get(other.greet.remote()) == "here"


def test_ending_finishes_the_shards_in_hand_and_begins_no_other(prepared: Setup, cluster: None) -> None:
    switch, outcomes = Switch(), []
    for outcome in on_ray.run(prepared, jobs(), 1, switch):
        if outcome:
            outcomes.append(outcome)
            switch.ending = True
    assert 1 <= len(outcomes) <= 2  # the first, and the one behind it where that had begun when the end was heard
    assert committed(outcomes) == sorted(digests(prepared))
    assert not list(Path(prepared.store).glob("**/.tmp*"))


def test_actors_larger_than_any_node_are_refused_with_what_there_is(prepared: Setup, cluster: None) -> None:
    with pytest.raises(StageError, match=r"1 Ray actor of 8 CPUs each: the cluster has \d of 4 CPUs free; no node is"):
        list(on_ray.run(replace(prepared, threads=8), jobs(), 0, Switch(), patience=2))


def test_a_missing_teacher_ends_the_run_in_one_line(prepared: Setup, tmp_path: Path, cluster: None) -> None:
    missing = shutil.copytree(prepared.teacher or "", tmp_path / "teacher")
    (missing / "weights.safetensors").unlink()
    with pytest.raises(StageError, match=r"a Ray actor cannot begin on .*weights.safetensors") as caught:
        list(on_ray.run(replace(prepared, teacher=str(missing)), jobs(), 1, Switch()))
    assert len(str(caught.value).splitlines()) == 1


def whoever(*seen: object, device: str, threads: int) -> tuple[int, str, tuple[object, ...], str]:
    return os.getpid(), device, (*seen, threads), sys.path[-1]


def niceness() -> int:
    return os.nice(0)


def test_workers_are_as_nice_as_the_command_and_no_nicer(cluster: None) -> None:
    import ray

    assert ray.get(ray.remote(niceness).remote()) == os.nice(0)


def test_a_probe_runs_on_a_worker_where_the_devices_are(cluster: None) -> None:
    process, device, seen, beside = on_ray.on_a_worker(whoever, "auto", 2, None, 1, "x", threads=2)
    assert process != os.getpid()
    assert (device, seen) == ("cpu", (1, "x", 2))
    assert beside == os.getcwd(), "modules beside the config are found"


def refusing(*_: object, device: str) -> None:
    raise Unfit(f"no such thing on {device}; name another")


def test_what_a_probe_refuses_is_told_as_if_it_ran_here(cluster: None) -> None:
    with pytest.raises(Unfit, match=r"^no such thing on cpu; name another$"):
        on_ray.on_a_worker(refusing, "auto", 1, None)


def test_no_jobs_need_no_cluster(prepared: Setup) -> None:
    assert list(on_ray.run(prepared, [], 2, Switch(), address="127.0.0.1:1")) == []
