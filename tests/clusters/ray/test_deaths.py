"""Shards that kill their workers, and workers that die with any shard."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.stages.base import StageError
from nfm.stages.executors import ray as on_ray
from nfm.stages.executors.ray_cluster import start_local
from tests.clusters.ray.shards import NAMES, Assassin, Switch, bare, digests, ended, jobs, serially, writer_of

if TYPE_CHECKING:
    from tests.conftest import Lab

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    start_local(2)
    yield
    ray.shutdown()


def test_a_shard_that_always_kills_its_worker_is_set_aside_and_the_rest_goes_on(
    made: Lab, tmp_path: Path, cluster: None
) -> None:
    setup = bare(made, tmp_path / "store")
    heard: list[str] = []
    with Assassin(setup, NAMES[1], times=100) as assassin:
        outcomes = ended(on_ray.run(setup, jobs(), 2, Switch(), say=heard.append))
    assert assassin.kills == 5
    failed = [outcome for outcome in outcomes if outcome.commit is None]
    assert [outcome.job.name for outcome in failed] == [NAMES[1]]
    assert (failed[0].error or "").startswith("killed its worker five times; the last: The actor died")
    expected = serially(made, tmp_path / "serial")
    assert digests(setup) == {name: digest for name, digest in expected.items() if name != NAMES[1]}
    assert sum(text.startswith("lost Ray actor ") for text in heard) == 5


def test_workers_that_die_whatever_shard_they_have_end_the_run_in_one_message(
    made: Lab, tmp_path: Path, cluster: None
) -> None:
    setup = bare(made, tmp_path / "store")
    over = threading.Event()

    def kill_all() -> None:
        while not over.wait(0.002):
            if (pid := writer_of(setup.store, "d0")) is not None:
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_all, daemon=True)
    killer.start()
    try:
        with pytest.raises(StageError, match=r"6 Ray actors in a row died .* lower pairs.batch_size"):
            ended(on_ray.run(setup, jobs(), 1, Switch()))
    finally:
        over.set()
        killer.join()
    assert digests(setup) == {}
