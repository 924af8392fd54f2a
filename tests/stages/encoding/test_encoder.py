"""One shard, from images to its commit: too little memory, overlap, and the error of z against float64."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from nfm.stages.encoding.encoder import Encoder, Setup
from nfm.stages.executors.jobs import Job
from nfm.stages.pairs import stage as pairs
from nfm.storage import layouts
from nfm.storage.format import codecs
from nfm.storage.format.spec import read_spec
from nfm.storage.ledger import commits

if TYPE_CHECKING:
    from tests.conftest import Lab

LARGE = 8_192  # rows of a batch: some hundred MB in the tiny teacher

UNDER_A_LIMIT = """
import json, resource, sys
from nfm.stages.encoding.encoder import Encoder, Setup
from nfm.stages.executors.jobs import Job
encoder = Encoder(Setup(**json.loads(sys.argv[1])))
encoder.batch_size = 32
encoder.encode_shard(Job("d001-s00000", "warm"))  # what is loaded and reserved by a first shard is not the batch's
encoder.batch_size = encoder.setup.batch_size
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + 140 * 2**20, hard))
first = encoder.encode_shard(Job("d000-s00000", "one"))
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
second = encoder.encode_shard(Job("d000-s00001", "two"))
print(first.batch_size, second.batch_size, encoder.batch_size)
"""


@pytest.fixture
def prepared(lab: Lab) -> Setup:
    """The setup of a store whose spec stands and whose shards are all missing."""
    store = lab.only("pairs")
    for folder in ("shards", "commits", "index"):
        shutil.rmtree(store.path / folder)
    inputs = {stage: lab.only(stage).path for stage in ("data", "teacher")}
    return pairs.setup(pairs.PairsConfig(batch_size=32), inputs, store.path)


def noise_of(store: Path, name: str) -> np.ndarray:
    """The noise of a committed shard."""
    spec, commit = read_spec(store), commits.read(store, name)
    assert commit is not None
    shard = layouts.open_shard(spec, [store / commit.payload.path], commit.records)
    return codecs.unpack(shard.read("noise", 0, commit.records), spec.noise_step)


def test_a_batch_that_does_not_fit_into_memory_is_halved_remembered_and_recorded(prepared: Setup, made: Lab) -> None:
    setup = {**asdict(prepared), "batch_size": LARGE}
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT, json.dumps(setup)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second, kept = map(int, done.stdout.split())
    assert first == second == kept < LARGE
    commit = commits.read(prepared.store, "d000-s00001")
    assert commit is not None
    assert commit.batch_size == kept
    for name in ("d000-s00000", "d000-s00001"):
        np.testing.assert_allclose(
            noise_of(Path(prepared.store), name), noise_of(made.only("pairs").path, name), atol=2e-3, rtol=2e-3
        )


def test_only_after_out_of_memory_a_smaller_batch_is_tried(prepared: Setup) -> None:
    encoder = Encoder(prepared)
    encoder.coupling.model.blocks[0].positions.data = encoder.coupling.model.blocks[0].positions.data[:3]  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="size of tensor"):
        encoder.encode_shard(Job("d000-s00000", "a1"))
    assert encoder.batch_size == 32


def test_a_shard_says_where_its_time_went_and_how_far_it_is_from_float64(prepared: Setup) -> None:
    encoder = Encoder(prepared)
    commit = encoder.encode_shard(Job("d000-s00000", "a1"))
    timing = encoder.timing
    # The watches stop one after the other, on threads that may be kept waiting in between.
    assert 0 < max(timing.read, timing.encode, timing.write) <= timing.wall + 0.1
    assert commit.noise_error is not None
    assert 0 < commit.noise_error < 1e-4
    coarse = Encoder(Setup(**{**asdict(prepared), "precision": "bfloat16"}))
    assert coarse.encode_shard(Job("d000-s00000", "b1")) == commit  # the first one stands
    assert coarse.noise_error is not None
    assert 10 * commit.noise_error < coarse.noise_error < 0.1
    assert encoder.encode_shard(Job("d000-s00001", "a1")).noise_error is None  # once a store is enough


def test_nothing_is_left_when_a_shard_is_dropped_in_the_middle(prepared: Setup) -> None:
    encoder, looks = Encoder(prepared), iter([False, True])
    with pytest.raises(InterruptedError):
        encoder.encode_shard(Job("d000-s00000", "a1"), lambda: next(looks))
    assert not [path for folder in ("shards", "index", "commits") for path in encoder.store.glob(f"{folder}/*")]
