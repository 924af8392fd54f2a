"""A store inside torch's DataLoader and torchdata's StatefulDataLoader, with and without workers."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from nfm.storage import PairStore
from tests.clusters.distributed import processes, resume_loader
from tests.clusters.distributed.sequences import Recorded, assert_same, load, record
from tests.clusters.distributed.training import BATCH, loader

STOP = 20  # in the middle of the second epoch
WORKERS = (0, 2)


@pytest.fixture(scope="module")
def alone(store: PairStore) -> Recorded:
    """What a reader yields in three epochs."""
    return record(store.batches(BATCH, seed=3, epochs=3))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_data_loader_yields_the_readers_order(workers: int, store: PairStore, alone: Recorded) -> None:
    dataset = store.as_torch_dataset(BATCH, seed=3, epochs=3)
    found = DataLoader(dataset, batch_size=None, num_workers=workers)
    assert_same(record(found), alone)


def test_an_epoch_a_pass_with_workers_that_persist(store: PairStore, alone: Recorded) -> None:
    dataset = store.as_torch_dataset(BATCH, seed=3, epochs=1)
    passes = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    found = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        found += record(passes)
    assert_same(found, alone)


@pytest.fixture(scope="module")
def resumed(store: PairStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Recorded]]:
    """What loaders yielded before their state was saved in mid-epoch; a new process went on from there."""
    folder, before = tmp_path_factory.mktemp("loaders"), {}
    for workers in WORKERS:
        stopped = loader(store, workers)
        before[workers] = record(islice(stopped, STOP))
        torch.save(stopped.state_dict(), folder / f"state.{workers}.pt")
    calls = {f"{workers}-workers": (str(store.root), folder, workers) for workers in WORKERS}
    processes.run(resume_loader.main, folder / "errors", calls)
    return folder, before


@pytest.mark.parametrize("workers", WORKERS)
def test_a_stateful_data_loader_goes_on_in_a_new_process(
    workers: int, resumed: tuple[Path, dict[int, Recorded]], alone: Recorded
) -> None:
    folder, before = resumed
    assert_same(before[workers], alone[:STOP])
    assert_same(load(folder / f"resumed.{workers}.npz"), alone[STOP:])


@pytest.mark.parametrize("workers", WORKERS)
def test_a_stateful_data_loader_goes_on_in_the_same_process(workers: int, store: PairStore, alone: Recorded) -> None:
    stopped = loader(store, workers)
    record(islice(stopped, STOP))
    again = loader(store, workers)
    again.load_state_dict(stopped.state_dict())
    assert_same(record(again), alone[STOP:])
