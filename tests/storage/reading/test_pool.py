"""A batch belongs to its holder: nothing changes memory that is still referred to, and a steady loop
allocates nothing.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from nfm.storage import Mixture, PairStore
from nfm.storage.format.fields import pair_fields
from nfm.storage.reading.pool import Pool, empty
from tests.support.patience import PATIENCE

KINDS = {
    "arrays": {},
    "inline": {"prefetch": False},
    "tensors": {"device": "cpu"},
    "stored": {"raw": True},
    "stored tensors": {"raw": True, "device": "cpu", "prefetch": False},
    "windowed": {"shuffle": "windowed", "window": 1},
    "softened": {"soften": 0.5},
}
NAMES = ("image", "noise", "label", "slot", "draw", "store")


@pytest.fixture
def store(make_store):
    return PairStore.open(make_store())


def copied(batches) -> list[dict[str, np.ndarray]]:
    """What is in batches, each copied before the next one is asked for."""
    return [{name: np.array(getattr(batch, name)) for name in NAMES} for batch in batches]


def same(batches, expected) -> bool:
    return all(
        np.array_equal(np.asarray(getattr(batch, name)), one[name])
        for batch, one in zip(batches, expected, strict=True)
        for name in NAMES
    )


@pytest.mark.parametrize("kind", KINDS)
def test_batches_in_a_list_stay_what_they_are(store, kind):
    options = {"epochs": 8, "last": "keep", **KINDS[kind]}
    expected = copied(store.batches(7, **options))
    kept = list(store.batches(7, **options))
    assert len(kept) == 64
    assert same(kept, expected)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_batches_of_a_mixture_of_codecs_stay_what_they_are(store, make_store, small_spec, device):
    other = replace(small_spec, coupling="nfm", codec="float32", fields=pair_fields((1, 4, 4), "float32"))
    mixture = Mixture([(store, 0.3), (PairStore.open(make_store(2, other, "nfm")), 0.7)])
    expected = copied(mixture.batches(10, epochs=6, device=device))
    assert same(list(mixture.batches(10, epochs=6, device=device)), expected)


def test_neighbours_of_one_reader_and_of_two_stay_what_they_are(store):
    expected = copied(store.batches(5, epochs=4))
    reader, other = store.batches(5, epochs=4), store.batches(5, epochs=4)
    for number, ((one, two), three) in enumerate(zip(zip(reader, reader), other)):
        assert same([one, two, three], [expected[2 * number], expected[2 * number + 1], expected[number]])


@pytest.mark.parametrize("device", [None, "cpu"])
def test_batches_that_wait_in_a_queue_stay_what_they_are(store, device):
    expected = copied(store.batches(5, epochs=6))
    waiting = queue.Queue(maxsize=4)
    thread = threading.Thread(target=lambda: [waiting.put(b) for b in store.batches(5, epochs=6, device=device)])
    thread.start()
    for one in expected:
        assert same([waiting.get(timeout=PATIENCE)], [one])
    thread.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_loader_stay_what_they_are(store, workers):
    expected = copied(store.batches(5, epochs=6))
    dataset = store.as_torch_dataset(5, epochs=6)
    kept = list(DataLoader(dataset, batch_size=None, num_workers=workers))
    for batch, one in zip(kept, expected, strict=True):
        assert all(np.array_equal(batch[name].numpy(), one[name]) for name in NAMES)


PARTS = {
    "array": lambda image: image[3:5],
    "array of an array": lambda image: image[1:].reshape(-1)[32:64].reshape(2, 1, 4, 4),
    "tensor": lambda image: torch.from_numpy(image)[3:5],
    "tensor of a tensor": lambda image: torch.from_numpy(image).view(-1, 16)[3:5].view(2, 1, 4, 4),
    "autograd": lambda image: torch.from_numpy(image)[3:5].requires_grad_().square().grad_fn._saved_self.detach(),
    "memoryview": lambda image: memoryview(image)[3:5],
    "dlpack": lambda image: torch.from_dlpack(image)[3:5],
    "bytes": lambda image: np.frombuffer(memoryview(image).cast("B"), np.float32).reshape(-1, 1, 4, 4)[3:5],
}


@pytest.mark.parametrize("part", PARTS)
def test_what_is_made_of_a_batch_keeps_its_memory(store, part):
    expected = [one["image"][3:5] for one in copied(store.batches(5, epochs=6))]
    kept = [PARTS[part](batch.image) for batch in store.batches(5, epochs=6)]
    for found, one in zip(kept, expected, strict=True):
        np.testing.assert_allclose(np.asarray(found), one, rtol=1e-6)


def test_slices_of_a_devices_tensors_keep_their_memory(store):
    expected = [one["noise"][2:] for one in copied(store.batches(5, epochs=6))]
    kept = [batch.noise.view(5, 16)[2:].t() for batch in store.batches(5, epochs=6, device="cpu")]
    for found, one in zip(kept, expected, strict=True):
        assert np.array_equal(found.t().reshape(-1, 1, 4, 4).numpy(), one)


def test_a_batch_may_be_written_into(store):
    expected = copied(store.batches(5, epochs=4))
    for batch, one in zip(store.batches(5, epochs=4), expected, strict=True):
        assert same([batch], [one])
        for name in NAMES:
            getattr(batch, name)[...] = 7


@pytest.mark.parametrize(("options", "most"), [({}, 3), ({"prefetch": False}, 2), ({"device": "cpu"}, 3)])
def test_a_steady_loop_allocates_nothing(store, options, most):
    reader = store.batches(5, epochs=None, **options)
    for batch in islice(reader, 10):
        assert len(batch) == 5
    early = reader.allocated
    assert set(early) >= set(NAMES)
    for batch in islice(reader, 300):
        assert len(batch) == 5
    assert all(made <= most for made in reader.allocated.values())
    assert sum(reader.allocated.values()) <= sum(early.values()) + len(early)  # a thread that was late at first
    reader.close()


def test_a_loop_that_holds_several_batches_at_a_time_allocates_no_more_than_it_holds(store):
    reader, group = store.batches(5, epochs=None), []
    for batch in islice(reader, 400):
        group.append(batch)
        if len(group) == 4:
            group.clear()
    assert max(reader.allocated.values()) <= 4 + 3
    reader.close()


def test_a_label_that_is_kept_keeps_no_image(store):
    reader = store.batches(5, epochs=20)
    labels = [batch.label for batch in reader]
    assert len(labels) == 200
    assert reader.allocated["image"] <= 3 < reader.allocated["label"]


@pytest.fixture
def pool():
    """A pool, and what it allocated, alive or not."""
    memory = []

    def allocate(shape, dtype):
        array = np.empty(shape, dtype)
        memory.append(weakref.ref(array))
        return array

    return Pool((4, 3), np.dtype(np.float32), allocate), memory


def test_what_came_back_is_lent_again_and_what_did_not_is_not(pool):
    pool, _ = pool
    first = pool.lend(4)
    second, at = pool.lend(2), first.ctypes.data
    assert (first.shape, second.shape, pool.made) == ((4, 3), (2, 3), 2)
    part = first.T[1:]
    del first
    assert pool.lend(4).ctypes.data not in (at, second.ctypes.data)
    del part
    assert pool.lend(3).ctypes.data == at
    assert pool.made == 3


def test_another_thread_may_be_the_last_holder(pool):
    pool, _ = pool
    box = [pool.lend(4)]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    pool.lend(4)
    assert pool.made == 1


def test_memory_is_let_go_of_beyond_some_spare_and_when_the_reader_ends(pool):
    pool, memory = pool
    held = [pool.lend(4) for _ in range(50)]
    held.clear()
    assert 2 <= sum(one() is not None for one in memory) <= 8
    held = [pool.lend(4) for _ in range(3)]
    pool.clear()
    assert sum(one() is not None for one in memory) == 3
    held.pop()
    assert sum(one() is not None for one in memory) == 2


@pytest.mark.parametrize("megabytes", [0, 1, 3, 6])
@pytest.mark.parametrize("dtype", ["uint8", "float16", "int64"])
def test_memory_of_any_size_is_a_separate_array(megabytes, dtype):
    records = (megabytes << 20) // (8 * np.dtype(dtype).itemsize)
    found = empty((records, 8), np.dtype(dtype))
    assert (found.shape, found.dtype) == ((records, 8), np.dtype(dtype))
    assert found.flags.c_contiguous
    assert found.flags.writeable
    assert found.flags.aligned
    found[...] = 1
    assert Counter(found[:2].reshape(-1).tolist()) == Counter({1: 8 * min(records, 2)})
