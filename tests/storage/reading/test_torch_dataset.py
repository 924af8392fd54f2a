"""Inside a DataLoader: the reader's order with any number of workers, and exact resume under StatefulDataLoader."""

from __future__ import annotations

import multiprocessing
import pickle

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from nfm.storage import Mixture, PairStore, StateMismatch, StorageError
from tests.support.forkserver import context
from tests.support.sizes import FULL


@pytest.fixture
def store(make_store):
    return PairStore.open(make_store())


def slots(loader, count=None) -> list[list[int]]:
    return [batch["slot"].tolist() for _, batch in zip(range(10**6 if count is None else count), loader)]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("shuffle", ["full", "windowed"])
def test_the_loaders_order_is_the_readers(store, workers, shuffle):
    options = {
        "seed": 3,
        "epochs": 2,
        "shuffle": shuffle,
        "last": "keep",
        "window": 1,
    }
    expected = list(store.batches(8, device="cpu", **options))
    dataset = store.as_torch_dataset(8, **options)
    found = list(DataLoader(dataset, batch_size=None, num_workers=workers))
    assert len(found) == len(dataset) == len(expected) == 14
    for ours, theirs in zip(expected, found):
        assert set(theirs) == {"image", "noise", "label", "slot", "draw", "store"}
        assert all(torch.equal(getattr(ours, name), tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("size", [{}, {"batch_size": 4}, {"batch_size": 2, "num_workers": 1}])
def test_a_loader_that_would_make_batches_of_batches_fails(store, size):
    """The default of torch's loader is batch_size=1: images got a fifth axis, and training went on."""
    with pytest.raises(StorageError, match=r"complete batches.* pass it batch_size=None"):
        next(iter(DataLoader(store.as_torch_dataset(8), **size)))


def test_workers_that_inherit_nothing_read_the_same(store):
    dataset = store.as_torch_dataset(10, filter=[("label", "<", 5)], raw=True)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=1, persistent_workers=True, multiprocessing_context=context
    )
    batches = list(loader)
    expected = [batch.slot.tolist() for batch in store.batches(10, filter=[("label", "<", 5)], epochs=2)]
    assert [batch["slot"].tolist() for batch in batches] + slots(loader) == expected
    assert batches[0]["noise"].dtype == torch.float16
    assert batches[0]["image"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("workers", "stopped"),
    [(workers, stopped) for workers in (0, 2) for stopped in (0, 1, 4, 13) if FULL or not workers or stopped == 4],
)
def test_a_stateful_loader_resumes_exactly(store, workers, stopped):
    def loader():
        dataset = store.as_torch_dataset(8, seed=1, epochs=2, last="keep")
        return StatefulDataLoader(dataset, batch_size=None, num_workers=workers)

    whole, later = [slots(loader) for loader in [loader()] * 2]
    first = loader()
    head = slots(first, stopped)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = loader()
    second.load_state_dict(state)
    assert head + slots(second) == whole
    assert slots(second) == later


def test_a_state_goes_from_the_reader_to_the_dataset_and_back(store):
    reader = store.batches(8, epochs=2)
    head = [next(reader).slot.tolist() for _ in range(3)]
    dataset = store.as_torch_dataset(8, epochs=2)
    dataset.load_state_dict(reader.state_dict())
    tail = slots(DataLoader(dataset, batch_size=None, num_workers=2))
    assert head + tail == [batch.slot.tolist() for batch in store.batches(8, epochs=2)]
    dataset = store.as_torch_dataset(8, epochs=2)
    iterator = iter(dataset)
    assert next(iterator)["slot"].tolist() == head[0]
    other = store.batches(8, epochs=2)
    other.load_state_dict(dataset.state_dict())
    assert next(other).slot.tolist() == head[1]


def test_a_state_of_another_store_or_another_worker_is_refused(store):
    dataset = store.as_torch_dataset(8)
    with pytest.raises(StateMismatch, match="seed"):
        dataset.load_state_dict(store.batches(8, seed=7).state_dict())
    dataset.load_state_dict(dataset.state_dict() | {"turn": [1, 2]})
    with pytest.raises(StateMismatch, match="worker 1 of 2, this is 0 of 1"):
        next(iter(dataset))


def test_a_workers_state_of_another_batch_size_is_refused(store):
    """Its turns are of batches: with other ones the workers would read records twice, and others never."""
    of_two = store.as_torch_dataset(8).state_dict() | {"turn": [1, 2]}
    with pytest.raises(StateMismatch, match=r"one of several workers, with batch_size 8, and here it is 4: .*resume"):
        store.as_torch_dataset(4).load_state_dict(of_two)
    store.as_torch_dataset(4).load_state_dict(of_two | {"turn": None})


@pytest.mark.parametrize("workers", [0, 2])
def test_set_epoch_says_which_epoch_comes_next(store, workers):
    dataset = store.as_torch_dataset(10)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    epochs = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        epochs.append(slots(loader))
    assert epochs == [[b.slot.tolist() for b in store.batches(10, epochs=3)][5 * e : 5 * e + 5] for e in range(3)]


def test_set_epoch_leaves_a_loaded_state_of_an_earlier_epoch(store):
    whole = [batch.slot.tolist() for batch in store.batches(10, epochs=3)]
    dataset = store.as_torch_dataset(10)
    dataset.set_epoch(1)
    iterator = iter(dataset)
    state = [next(iterator), dataset.state_dict()][1]
    other = store.as_torch_dataset(10)
    other.load_state_dict(state)
    other.set_epoch(1)
    assert slots(other) == whole[6:10]
    other.load_state_dict(state)
    other.set_epoch(2)
    assert slots(other) == whole[10:]


def test_the_rank_is_that_of_the_process_that_makes_the_dataset(store, monkeypatch):
    ranks = [store.as_torch_dataset(10, rank=rank, world_size=2) for rank in range(2)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = [slots(DataLoader(dataset, batch_size=None, num_workers=1)) for dataset in ranks]
    monkeypatch.delenv("WORLD_SIZE")
    assert [a + b for a, b in zip(*parts)] == [batch.slot.tolist() for batch in store.batches(10)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StorageError, match="WORLD_SIZE is 2"):
        store.as_torch_dataset(10)


def test_mixtures_have_datasets_too(store):
    dataset = Mixture([(store, 0.5), (store, 0.5)]).as_torch_dataset(10)
    for batch in DataLoader(dataset, batch_size=None, num_workers=1):
        assert torch.bincount(batch["store"]).tolist() == [5, 5]


def test_batches_stay_valid(store):
    batches = list(store.as_torch_dataset(10))
    assert sorted(slot for batch in batches for slot in batch["slot"].tolist()) == list(range(50))
    assert all(torch.equal(b["label"], b["slot"] % 10) for b in batches)


def test_an_iteration_that_is_left_ends_its_thread(store):
    import threading

    for _ in store.as_torch_dataset(10, epochs=None):
        break
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nfm-")]


def test_wrong_use_is_refused_where_the_dataset_is_made(store):
    for options in ({"device": "cuda"}, {"prefetch": False}, {"batch_size": 51}, {"rank": 0}):
        with pytest.raises(ValueError, match=r"loader|exceeds|both"):
            store.as_torch_dataset(**({"batch_size": 10} | options))
    with pytest.raises(TypeError, match="no length"):
        len(store.as_torch_dataset(10, epochs=None))


def _read_in_child(store, shuffle, reader, expected, answer) -> None:
    answer.put(
        [
            [batch.slot.tolist() for batch in store.batches(10, shuffle=shuffle)] == expected,
            [batch.slot.tolist() for batch in reader] == expected[1:],
        ]
    )


@pytest.mark.parametrize("shuffle", ["full", "windowed"])
def test_a_store_and_a_reader_go_on_in_a_forked_process(store, shuffle):
    fork = multiprocessing.get_context("fork")
    expected = [batch.slot.tolist() for batch in store.batches(10, shuffle=shuffle)]
    reader = store.batches(10, shuffle=shuffle)
    next(reader)  # its threads are running while the process forks
    answer = fork.SimpleQueue()
    child = fork.Process(target=_read_in_child, args=(store, shuffle, reader, expected, answer))
    child.start()
    assert answer.get() == [True, True]
    child.join(10)
    assert child.exitcode == 0
    assert [batch.slot.tolist() for batch in reader] == expected[1:]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_readers_state_of_a_later_epoch_is_gone_on_from_once(store, workers):
    reader = store.batches(10, seed=3, epochs=3)
    read = [batch.slot.tolist() for batch in reader]
    each = len(read) // 3
    reader = store.batches(10, seed=3, epochs=3)
    for _ in range(each + 2):
        next(reader)
    dataset = store.as_torch_dataset(10, seed=3)
    dataset.load_state_dict(reader.state_dict())
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    assert slots(loader) == read[each + 2 : 2 * each]
    dataset.set_epoch(2)
    assert slots(loader) == read[2 * each :]
