"""Two real processes on one store, under plain DDP (gloo) and under Accelerate."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from nfm.storage import PairStore, StateMismatch, StorageError
from tests.clusters.distributed import processes, rank
from tests.clusters.distributed.sequences import Recorded, assert_same, join, load, record
from tests.clusters.distributed.training import BATCH, READERS, STOP, network, train

KINDS = ("plain", "accelerate")


@pytest.fixture(scope="module")
def groups(store: PairStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What both kinds of group left behind; they run at the same time."""
    folders = {how: tmp_path_factory.mktemp("groups") / how for how in KINDS}
    reader = store.batches(BATCH, seed=3, epochs=3)
    record(islice(reader, STOP))
    for folder in folders.values():
        folder.mkdir()
        (folder / "state.of-one.json").write_text(json.dumps(reader.state_dict()))
    calls = {
        f"{how}-rank{number}": (how, number, str(store.root), folder)
        for how, folder in folders.items()
        for number in range(rank.WORLD_SIZE)
    }
    processes.run(rank.main, tmp_path_factory.mktemp("ranks"), calls)
    return folders


@pytest.fixture(scope="module")
def alone(store: PairStore) -> Callable[[str], Recorded]:
    """What one process reads in three epochs."""
    return cache(lambda name: record(store.batches(BATCH, seed=3, epochs=3, **READERS[name])))


@pytest.fixture(params=KINDS)
def group(request: pytest.FixtureRequest, groups: dict[str, Path]) -> Path:
    return groups[request.param]


def both(group: Path, name: str) -> list:
    return [load(group / f"{name}.{number}.npz") for number in range(2)]


@pytest.mark.parametrize("name", READERS)
def test_the_ranks_batches_together_are_those_of_one_process(
    name: str, group: Path, alone: Callable[[str], Recorded]
) -> None:
    ranks = both(group, name)
    assert_same(join(ranks), alone(name))
    for first, second in zip(*ranks):
        assert not set(first["slot"].tolist()) & set(second["slot"].tolist())


def test_one_process_goes_on_where_two_stopped(group: Path, store: PairStore, alone: Callable[[str], Recorded]) -> None:
    states = [json.loads((group / f"state.{number}.json").read_text()) for number in range(2)]
    assert states[0] == states[1]
    reader = store.batches(BATCH, seed=3, epochs=3)
    reader.load_state_dict(states[0])
    assert_same(record(reader), alone("full")[STOP:])


def test_two_processes_go_on_where_one_stopped(group: Path, alone: Callable[[str], Recorded]) -> None:
    assert_same(join(both(group, "resumed")), alone("full")[STOP:])


def test_training_on_two_processes_is_training_on_one(group: Path, store: PairStore) -> None:
    one = network()
    train(one, store)
    for name, value in torch.load(group / "weights.pt", weights_only=True).items():
        np.testing.assert_allclose(value, one.state_dict()[name], rtol=1.3e-6, atol=1e-5)


def test_a_data_loader_with_workers_reads_each_ranks_part(groups: dict[str, Path], store: PairStore) -> None:
    assert_same(join(both(groups["plain"], "loader")), record(store.batches(BATCH, seed=3, epochs=2)))


def test_accelerate_saves_and_loads_the_reader_within_an_epoch(groups: dict[str, Path], store: PairStore) -> None:
    loaded = both(groups["accelerate"], "loaded")
    for here, there in zip(loaded, both(groups["accelerate"], "unbroken")):
        assert_same(here, there)
    assert_same(join(loaded), record(store.batches(BATCH, seed=3))[STOP:])


def test_a_state_of_two_processes_is_refused_for_another_seed(group: Path, store: PairStore) -> None:
    with pytest.raises(StateMismatch, match="seed"):
        store.batches(BATCH, seed=4).load_state_dict(json.loads((group / "state.0.json").read_text()))


@pytest.mark.parametrize("read", ["batches", "as_torch_dataset"])
def test_a_world_size_without_an_initialised_process_group_is_an_error(
    read: str, store: PairStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(StorageError, match=r"WORLD_SIZE is 2.*initialise torch.distributed"):
        getattr(store, read)(BATCH)


def test_batches_that_ranks_cannot_share_are_refused(store: PairStore) -> None:
    with pytest.raises(ValueError, match="is shared by 3 processes"):
        store.batches(BATCH, rank=0, world_size=3)
