"""Each iteration of a dataset continues with the next epoch, in any process: no loop reads one draw for ever."""

from __future__ import annotations

import copy
import pickle
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from nfm.storage import PairStore, StorageError
from nfm.storage.reading.starts import Start, Starts

HOW = {
    "in process": {},
    "new workers": {"num_workers": 2},
    "workers that persist": {"num_workers": 2, "persistent_workers": True},
}
EACH = 5  # batches of 10 in an epoch of 50 records


@pytest.fixture
def store(make_store):
    return PairStore.open(make_store())


@pytest.fixture
def epochs(store):
    """The batches of each of ten epochs, as a reader yields them."""
    read = slots(store.batches(10, epochs=10))
    assert read[:EACH] != read[2 * EACH : 3 * EACH]  # of the same draw, in another order
    return [read[EACH * e : EACH * (e + 1)] for e in range(10)]


def slots(loader, count=None) -> list[list[int]]:
    return [(b["slot"] if isinstance(b, dict) else b.slot).tolist() for b in islice(loader, count)]


def loader_of(dataset, how: str) -> DataLoader:
    return DataLoader(dataset, batch_size=None, **HOW[how])


@pytest.mark.parametrize("how", HOW)
def test_every_loop_over_a_loader_reads_the_next_epoch(store, epochs, how):
    loader = loader_of(store.as_torch_dataset(10), how)
    assert [slots(loader) for _ in range(3)] == epochs[:3]


@pytest.mark.parametrize("how", HOW)
def test_a_loop_that_is_left_is_followed_by_the_next_epoch(store, epochs, how):
    loader = loader_of(store.as_torch_dataset(10), how)
    assert slots(loader, 1) == epochs[0][:1]
    assert slots(loader, 4) == epochs[1][:4]
    assert slots(loader) == epochs[2]


@pytest.mark.parametrize("how", HOW)
def test_after_set_epoch_the_loops_go_on_from_there(store, epochs, how):
    dataset = store.as_torch_dataset(10)
    loader = loader_of(dataset, how)
    assert slots(loader, 2) == epochs[0][:2]
    dataset.set_epoch(5)
    assert [slots(loader), slots(loader)] == epochs[5:7]
    dataset.set_epoch(1)
    assert slots(loader) == epochs[1]


@pytest.mark.parametrize("how", HOW)
def test_loops_of_several_epochs_read_the_several_that_follow(store, epochs, how):
    dataset = store.as_torch_dataset(10, epochs=2)
    loader = loader_of(dataset, how)
    assert [len(dataset), slots(loader), slots(loader)] == [2 * EACH, epochs[0] + epochs[1], epochs[2] + epochs[3]]


@pytest.mark.parametrize("how", HOW)
def test_an_endless_loop_that_is_left_is_followed_by_an_epoch_that_was_not_begun(store, epochs, how):
    loader = loader_of(store.as_torch_dataset(10, epochs=None), how)
    assert slots(loader, 2 * EACH + 1) == [*epochs[0], *epochs[1], epochs[2][0]]
    later = slots(loader, EACH)
    # Workers read ahead of the loop, which may have taken them into the epoch after.
    assert later in ([epochs[3]] if how == "in process" else [epochs[3], epochs[4]])


@pytest.mark.parametrize("how", ["new workers", "workers that persist"])
def test_a_loaders_seed_that_comes_again_is_another_loop_all_the_same(store, epochs, how):
    loader = loader_of(store.as_torch_dataset(10), how)
    found = []
    for _ in range(3):
        torch.manual_seed(0)  # the workers' seeds are drawn from it
        found.append(slots(loader, 3))
    assert found == [epoch[:3] for epoch in epochs[:3]]


@pytest.mark.parametrize("how", HOW)
def test_two_loaders_of_a_dataset_read_an_epoch_each(store, epochs, how):
    dataset = store.as_torch_dataset(10)
    one, two = loader_of(dataset, how), loader_of(dataset, how)
    both = [(a["slot"].tolist(), b["slot"].tolist()) for a, b in zip(one, two)]
    assert sorted(zip(*both)) == sorted(map(tuple, epochs[:2]))
    assert slots(one) == epochs[2]


@pytest.mark.parametrize("how", HOW)
def test_a_loaded_state_is_gone_on_from_once(store, epochs, how):
    reader = store.batches(10, epochs=None)
    slots(reader, EACH + 2)
    dataset = store.as_torch_dataset(10)
    loader = loader_of(dataset, how)
    assert slots(loader, 1) == epochs[0][:1]
    dataset.load_state_dict(reader.state_dict())  # workers that persist are there already
    assert [slots(loader), slots(loader)] == [epochs[1][2:], epochs[2]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_that_was_read_to_its_end_is_resumed_with_the_next_epoch(store, epochs, workers):
    def stateful():
        return StatefulDataLoader(store.as_torch_dataset(10), batch_size=None, num_workers=workers)

    first, second = stateful(), stateful()
    assert [slots(first), slots(first)] == epochs[:2]
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    assert [slots(second), slots(second)] == epochs[2:4]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loop_is_followed_by_the_next_epoch(store, epochs, workers):
    def stateful():
        return StatefulDataLoader(store.as_torch_dataset(10), batch_size=None, num_workers=workers)

    first, second = stateful(), stateful()
    assert [slots(first), slots(first, 3)] == [epochs[0], epochs[1][:3]]
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    assert [slots(second), slots(second)] == [epochs[1][3:], epochs[2]]


def test_the_state_of_an_ended_iteration_or_reader_is_followed_by_the_next_epoch(store, epochs):
    dataset, reader = store.as_torch_dataset(10), store.batches(10)
    assert slots(dataset) == slots(reader) == epochs[0]
    for state in (dataset.state_dict(), reader.state_dict()):
        other = store.as_torch_dataset(10)
        other.load_state_dict(state)
        assert other.state_dict()["epoch"] == 1
        assert slots(other) == epochs[1]


def test_ranks_read_the_same_epoch(store, epochs):
    ranks = [store.as_torch_dataset(10, rank=rank, world_size=2) for rank in range(2)]
    for epoch in epochs[:3]:
        assert [a + b for a, b in zip(*map(slots, ranks), strict=True)] == epoch


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_a_copy_counts_for_itself(store, epochs, copied):
    dataset = store.as_torch_dataset(10)
    assert slots(dataset) == epochs[0]
    other = copied(dataset)
    assert [slots(other), slots(other), slots(dataset)] == [epochs[1], epochs[2], epochs[1]]


def test_every_call_of_batches_begins_at_epoch_0_and_a_reader_goes_on(store, epochs):
    assert slots(store.batches(10)) == slots(store.batches(10)) == epochs[0]
    reader = store.batches(10, epochs=None)
    assert [slots(reader, EACH) for _ in range(3)] == epochs[:3]
    reader.close()


def test_readers_and_datasets_say_what_an_epoch_drops(store):
    assert "50 records an epoch in batches of 16, the last 2 dropped each epoch" in repr(store.batches(16))
    assert "the last 2 dropped each epoch" in repr(store.as_torch_dataset(16))
    assert "epoch 0" in repr(store.as_torch_dataset(16))
    for exact in (store.batches(16, last="keep"), store.batches(10)):
        assert "dropped" not in repr(exact)


class TestStarts:
    """Workers by hand: whoever comes first, they agree."""

    def test_workers_agree_in_any_order_also_beside_another_loaders(self):
        starts, one, two = Starts(), (7, 0), (9, 0)
        calls = [(one, 1), (two, 0), (one, 0), (two, 2), (one, 2), (two, 1)]
        found = [starts.join(name, worker, 3, None)[0].first for name, worker in calls]
        assert found == [0, 3, 0, 3, 0, 3]
        assert starts.next_epoch == 6

    def test_a_worker_that_comes_late_begins_what_the_others_began(self):
        starts = Starts()
        assert starts.join((7, 0), 0, 1, None)[0].first == 0
        starts.ask(Start(5, 5))
        assert starts.join((7, 1), 0, 1, None)[0].first == 5
        assert [starts.join((7, turn), 1, 1, None)[0].first for turn in range(3)] == [0, 5, 6]

    def test_a_worker_that_never_came_changes_nothing(self):
        starts = Starts()
        starts.join((7, 0), 0, 1, None)
        assert [starts.join((8, 0), worker, 1, None)[0].first for worker in (1, 0)] == [1, 1]

    def test_a_workers_own_state_says_where_it_goes_on_and_what_follows(self):
        starts = Starts()
        own = [Start(4, 5, 30 + 10 * worker, worker, 2) for worker in range(2)]
        assert [starts.join((7, 0), worker, 2, own[worker])[0] for worker in range(2)] == own
        assert starts.join((7, 1), 1, 2, None)[0] == Start(6, 6)

    def test_many_iterations_are_counted(self):
        starts = Starts()
        assert [starts.begin(1)[0].first for _ in range(100)] == list(range(100))

    def test_too_many_workers_are_refused_by_name(self):
        with pytest.raises(StorageError, match="num_workers"):
            Starts().join((7, 0), 1024, 1, None)


@pytest.mark.parametrize("epoch", [-1, 1.5, float("nan"), True, "1", None])
def test_an_invalid_epoch_is_refused(make_store, epoch):
    dataset = PairStore.open(make_store()).as_torch_dataset(5)
    with pytest.raises(ValueError, match=r"epoch is .*: it must be a whole number, 0 to 1000000000"):
        dataset.set_epoch(epoch)
