"""Two real processes on one store, under plain DDP (gloo) and under Accelerate."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from nfm.storage import PairStore, StateMismatch, StorageError
from tests.distributed.sequences import assert_same, join, load, record
from tests.distributed.training import BATCH, READERS, STOP, network, train


def start(how: str, store: PairStore, folder: Path) -> list[subprocess.Popen[str]]:
    """Both processes of a group, as torchrun would start them."""
    reader = store.batches(BATCH, seed=3, epochs=3)
    record(islice(reader, STOP))
    folder.mkdir()
    (folder / "state.of-one.json").write_text(json.dumps(reader.state_dict()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "rank.py"), how, str(store.root), str(folder)],
            env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


@pytest.fixture(scope="module")
def groups(store: PairStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What both kinds of group left behind; they run at the same time."""
    folders = {how: tmp_path_factory.mktemp("groups") / how for how in ("plain", "accelerate")}
    running = [(how, process) for how, folder in folders.items() for process in start(how, store, folder)]
    for how, process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, f"{how}: {err}"
    return folders


@pytest.fixture(params=["plain", "accelerate"])
def group(request: pytest.FixtureRequest, groups: dict[str, Path]) -> Path:
    return groups[request.param]


def both(group: Path, name: str) -> list:
    return [load(group / f"{name}.{rank}.npz") for rank in range(2)]


@pytest.mark.parametrize("name", READERS)
def test_the_ranks_batches_together_are_those_of_one_process(name: str, group: Path, store: PairStore) -> None:
    alone = record(store.batches(BATCH, seed=3, epochs=3, **READERS[name]))
    ranks = both(group, name)
    assert_same(join(ranks), alone)
    for first, second in zip(*ranks):
        assert not set(first["slot"].tolist()) & set(second["slot"].tolist())


def test_one_process_goes_on_where_two_stopped(group: Path, store: PairStore) -> None:
    states = [json.loads((group / f"state.{rank}.json").read_text()) for rank in range(2)]
    assert states[0] == states[1]
    reader = store.batches(BATCH, seed=3, epochs=3)
    reader.load_state_dict(states[0])
    assert_same(record(reader), record(store.batches(BATCH, seed=3, epochs=3))[STOP:])


def test_two_processes_go_on_where_one_stopped(group: Path, store: PairStore) -> None:
    assert_same(join(both(group, "resumed")), record(store.batches(BATCH, seed=3, epochs=3))[STOP:])


def test_training_on_two_processes_is_training_on_one(group: Path, store: PairStore) -> None:
    alone = network()
    train(alone, store)
    for name, value in torch.load(group / "weights.pt", weights_only=True).items():
        torch.testing.assert_close(value, alone.state_dict()[name])


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
def test_a_world_that_nobody_joined_is_an_error(read: str, store: PairStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(StorageError, match=r"WORLD_SIZE is 2.*initialise torch.distributed"):
        getattr(store, read)(BATCH)


def test_batches_that_ranks_cannot_share_are_refused(store: PairStore) -> None:
    with pytest.raises(ValueError, match="divisible by the world size 3"):
        store.batches(BATCH, rank=0, world_size=3)
