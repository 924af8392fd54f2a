"""Executors: wherever shards are encoded, the bytes are the same, and a bad shard costs only itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from nfm.stages.base import StageError
from nfm.stages.encoding.encoder import Encoder, Setup
from nfm.stages.executors import ray as on_ray
from nfm.stages.executors import serial, slurm
from nfm.stages.executors.jobs import Job, Outcome, new_attempt
from nfm.stages.pairs import stage as pairs
from nfm.storage.format.spec import read_spec, shard_name
from nfm.storage.ledger import commits

pytestmark = [pytest.mark.ray, pytest.mark.seconds(30)]  # a small machine starts one Ray at a time

if TYPE_CHECKING:
    from tests.conftest import Lab

EXECUTORS = {"serial": serial.run, "ray": on_ray.run, "slurm": slurm.run}
everywhere = pytest.mark.parametrize("executor", EXECUTORS)


class Switch:
    """A halt that a test turns."""

    stopping = ending = False


def run(executor: str, setup: Setup, workers: int = 2, switch: Switch | None = None) -> Iterator[Outcome]:
    """The outcomes of all jobs, ticks left out."""
    found = EXECUTORS[executor](setup, jobs(), workers, switch or Switch())
    return (outcome for outcome in found if outcome is not None)


@pytest.fixture
def prepared(lab: Lab) -> Setup:
    """The setup of a store whose spec stands and whose shards are all missing."""
    store = lab.only("pairs")
    for folder in ("shards", "commits", "index"):
        shutil.rmtree(store.path / folder)
    inputs = {stage: lab.only(stage).path for stage in ("data", "teacher")}
    return pairs.setup(pairs.PairsConfig(batch_size=32), inputs, store.path)


def jobs() -> list[Job]:
    return [Job(shard_name(draw, shard), new_attempt()) for draw in range(2) for shard in range(4)]


def digests(store: str) -> dict[str, str]:
    return {name: commit.payload.sha256 for name, commit in commits.committed(store, 2).items()}


@pytest.fixture
def expected(made: Lab) -> dict[str, str]:
    """The payloads that the tiny run's own serial executor wrote."""
    return digests(str(made.only("pairs").path))


@pytest.mark.parametrize(
    ("executor", "workers"),
    [
        ("serial", 1),
        ("slurm", 1),
        ("ray", 2),
        pytest.param("ray", 1, marks=pytest.mark.long),
        pytest.param("ray", 3, marks=pytest.mark.long),
    ],
)
def test_every_executor_writes_the_same_bytes_at_any_number_of_workers(
    prepared: Setup, expected: dict[str, str], cluster: None, executor: str, workers: int
) -> None:
    outcomes = list(run(executor, prepared, workers))
    assert sorted(outcome.commit.name for outcome in outcomes if outcome.commit) == sorted(expected)
    assert digests(prepared.store) == expected
    assert all(outcome.worker and outcome.timing and outcome.timing.wall > 0 for outcome in outcomes)


@everywhere
def test_a_shard_that_fails_three_times_is_yielded_with_its_traceback_and_the_rest_goes_on(
    prepared: Setup, cluster: None, executor: str
) -> None:
    shard = Path(prepared.data) / "train/s00001.tar"  # rows 128 to 255: shards 2 and 3 of both draws
    shard.write_bytes(shard.read_bytes()[:-3000])
    outcomes = list(run(executor, prepared, 1))
    assert sorted(o.job.name for o in outcomes if o.commit) == [
        shard_name(draw, at) for draw in (0, 1) for at in (0, 1)
    ]
    failed = [outcome for outcome in outcomes if outcome.commit is None]
    assert len(failed) == 4
    assert all("s00001.tar" in (outcome.error or "") for outcome in failed)
    assert not list(Path(prepared.store).glob("shards/*s00002*"))


@everywhere
def test_a_stop_ends_early_and_keeps_what_is_committed(prepared: Setup, cluster: None, executor: str) -> None:
    done: list[Outcome] = []
    switch = Switch()
    for outcome in run(executor, prepared, 1, switch):
        done.append(outcome)
        switch.stopping = switch.ending = len(done) >= 2
    assert 2 <= len(done) < 8
    assert {outcome.commit.name for outcome in done if outcome.commit} <= set(digests(prepared.store))


@everywhere
def test_a_teacher_that_is_not_its_manifests_is_refused_in_one_message(
    prepared: Setup, cluster: None, executor: str
) -> None:
    weights = Path(prepared.teacher or "") / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(StageError, match="not the weights that its manifest lists") as caught:
        list(run(executor, prepared, 1))
    assert len(str(caught.value).splitlines()) == 1
    assert not list(Path(prepared.store).glob("commits/*"))


def test_a_record_does_not_depend_on_the_others_in_its_batch(prepared: Setup) -> None:
    encoder = Encoder(prepared)
    whole = encoder.encode_slots(1, np.arange(64, 96))
    alone = encoder.encode_slots(1, np.array([70]))
    for name, values in whole.items():
        np.testing.assert_array_equal(alone[name][0], values[6], err_msg=name)


def test_decoding_the_stored_noise_gives_the_noised_image_back(made: Lab) -> None:
    store = made.only("pairs").path
    inputs = {stage: made.only(stage).path for stage in ("data", "teacher")}
    encoder = Encoder(pairs.setup(pairs.PairsConfig(batch_size=32), inputs, store))
    slots = np.arange(32)
    noise = encoder.encode_slots(0, slots)["noise"]
    assert encoder.decode_error(0, slots, noise).max() < 1e-3
    assert encoder.decode_error(1, slots, noise).min() > 1e-2  # the other draw noised the images otherwise


def test_a_losing_attempt_returns_the_commit_that_stands(prepared: Setup) -> None:
    encoder = Encoder(prepared)
    first = encoder.encode_shard(Job("d000-s00000", "first"))
    second = encoder.encode_shard(Job("d000-s00000", "second"))
    assert second.attempt == first.attempt == "first"
    assert [path.name for path in Path(prepared.store).glob("shards/*")] == ["d000-s00000.first.tar"]
    assert read_spec(prepared.store).slots_of(0) == range(64)
