"""Batches: exact resume on any number of ranks, honest counts, buffers used again, threads that end."""

from __future__ import annotations

import gc
import math
import threading
import time
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfm.storage import BatchReader, Mixture, PairStore, StateMismatch, StorageError
from nfm.storage.format.convert import to_float32
from nfm.storage.reading.stream import StoreStream, plan
from tests.storage.reading.running import threads
from tests.support.patience import PATIENCE

# The batches of two epochs of 23 records in shards of 5, seed 3: what students that stopped are resumed with.
FULL = [
    [0, 4, 7, 22], [5, 8, 10, 18], [1, 13, 14, 19], [9, 11, 15, 20], [3, 6, 16, 17], [2, 12, 21],
    [4, 13, 18, 20], [8, 9, 16, 17], [0, 5, 11, 22], [1, 3, 10, 12], [2, 6, 14, 21], [7, 15, 19],
]  # fmt: skip
WINDOWED = [
    [1, 16, 17, 18], [0, 2, 4, 15], [3, 11, 14, 19], [5, 6, 10, 13], [7, 8, 9, 12], [20, 21, 22],
    [1, 4, 20, 21], [0, 2, 3, 22], [11, 14, 17, 19], [10, 13, 15, 18], [6, 9, 12, 16], [5, 7, 8],
]  # fmt: skip
UNSHUFFLED = [list(range(at, min(at + 4, 23))) for at in range(0, 23, 4)] * 2


class Numbers:
    """A source in memory: row r of draw k is an image filled with r and noise filled with r + k / 10."""

    generation = None
    value_range = (0.0, 255.0)
    noise_step = None
    order_key = "order"
    content_digest = "content"
    rows_per_shard = 5
    remote = False

    def __init__(self, rows: int, draws: int = 1, broken: int | None = None) -> None:
        self.rows, self.draws, self.broken = rows, draws, broken
        self.gathered = 0

    def __len__(self):
        return self.rows

    def shard(self, draw, number):
        return SimpleNamespace(maps=[])

    def empty(self, records):
        return {
            "image": np.empty((records, 1, 2, 2), np.uint8),
            "noise": np.empty((records, 1, 2, 2), np.float16),
        }

    def gather(self, draw, rows, out):
        if self.broken is not None and self.broken in rows:
            raise StorageError(f"row {self.broken} is broken")
        out["image"][:] = (rows % 256)[:, None, None, None]
        out["noise"][:] = (rows % 256 + draw / 10).astype(np.float16)[:, None, None, None]
        self.gathered += 1


def make_reader(source, batch_size=4, seed=0, shuffle="full", window=2, **options) -> BatchReader:
    return BatchReader(StoreStream(source, seed, shuffle, window), batch_size, **options)


def slots(reader, count=None) -> list[list[int]]:
    return [batch.slot.tolist() for _, batch in zip(range(10**6 if count is None else count), reader)]


def flat(parts) -> list[int]:
    return list(chain.from_iterable(parts))


@given(
    st.integers(1, 400),
    st.integers(1, 50),
    st.sampled_from(["full", "windowed", None]),
    st.integers(0, 400),
)
def test_batches_after_any_count_hold_every_remaining_record_once(rows, batch_size, shuffle, consumed):
    stream = StoreStream(Numbers(rows, draws=3), 0, shuffle, 3)
    whole = stream.at(2, np.arange(rows)).slot
    planned = list(plan(stream, batch_size, False, 3, 2, consumed))
    assert all(len(each.records.slot) == batch_size for each in planned[:-1])
    for number, each in enumerate(planned):
        start = consumed + number * batch_size
        assert np.array_equal(each.records.slot, np.sort(whole[start : start + batch_size]))
        assert (each.epoch, each.consumed) == (2, min(rows, start + batch_size))
    assert sum(len(each.records.slot) for each in planned) == max(0, rows - consumed)


def test_dropping_the_last_batch_leaves_full_ones_only():
    def sizes(consumed: int, drop: bool) -> list[int]:
        stream = StoreStream(Numbers(50), 0, "full", 3)
        return [len(each.records.slot) for each in plan(stream, 16, drop, 1, 0, consumed)]

    assert sizes(0, drop=True) == [16, 16, 16]
    assert sizes(32, drop=True) == [16]
    assert sizes(48, drop=True) == []
    assert sizes(0, drop=False) == [16, 16, 16, 2]


@pytest.mark.parametrize(("shuffle", "expected"), [("full", FULL), ("windowed", WINDOWED), (None, UNSHUFFLED)])
def test_the_batches_never_change(shuffle, expected):
    reader = make_reader(Numbers(23, draws=2), seed=3, shuffle=shuffle, epochs=2, last="keep", prefetch=False)
    assert slots(reader) == expected


@settings(max_examples=60)
@given(
    rows=st.integers(1, 60),
    world=st.integers(1, 4),
    share=st.integers(1, 6),
    shuffle=st.sampled_from(["full", "windowed", None]),
    last=st.sampled_from(["keep", "drop"]),
)
def test_ranks_share_each_batch_and_every_record_comes_once(rows, world, share, shuffle, last):
    source, batch = Numbers(rows), world * share
    options = {"batch_size": batch, "shuffle": shuffle, "last": last, "prefetch": False}
    if last == "drop" and batch > rows:
        return
    alone = slots(make_reader(source, **options))
    ranks = [slots(make_reader(source, rank=rank, world_size=world, **options)) for rank in range(world)]
    assert [flat(parts) for parts in zip(*ranks, strict=True)] == alone
    seen = flat(alone)
    assert len(seen) == len(set(seen)) == (rows if last == "keep" else rows - rows % batch)


@settings(max_examples=40)
@given(
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    yielded=st.integers(0, 20),
    shuffle=st.sampled_from(["full", "windowed", None]),
    last=st.sampled_from(["keep", "drop"]),
)
def test_resume_yields_the_same_batches_at_any_world_size(before, after, yielded, shuffle, last):
    source = Numbers(53, draws=2)
    options = {"batch_size": 12, "shuffle": shuffle, "last": last, "epochs": 4, "prefetch": False}
    whole = slots(make_reader(source, **options))
    first = [make_reader(source, rank=rank, world_size=before, **options) for rank in range(before)]
    head = [slots(reader, yielded) for reader in first]
    states = [reader.state_dict() for reader in first]
    assert all(state == states[0] for state in states)
    second = [make_reader(source, rank=rank, world_size=after, **options) for rank in range(after)]
    for reader in second:
        reader.load_state_dict(states[0])
    tail = [slots(reader) for reader in second]
    joined = [flat(parts) for parts in zip(*head)] + [flat(parts) for parts in zip(*tail)]
    assert joined == whole


@pytest.mark.parametrize("world", [2, 3])
def test_the_place_of_a_record_in_its_batch_is_the_same_on_any_number_of_ranks(world):
    source, options = Numbers(40), {"batch_size": 12, "seed": 3, "epochs": 2}

    def places(rank: int, size: int) -> list[dict[int, int]]:
        reader = make_reader(source, rank=rank, world_size=size, **options)
        return [dict(zip(batch.slot.tolist(), batch.place.tolist(), strict=True)) for batch in reader]

    alone = places(0, 1)
    assert [sorted(batch.values()) for batch in alone] == [list(range(12))] * 6
    for whole, *parts in zip(alone, *(places(rank, world) for rank in range(world)), strict=True):
        assert {slot: place for part in parts for slot, place in part.items()} == whole


def test_the_state_counts_what_was_yielded_and_not_what_was_prefetched():
    source = Numbers(40)
    reader = make_reader(source, epochs=None)
    assert (reader.state_dict()["epoch"], reader.state_dict()["consumed"]) == (0, 0)
    next(reader)
    while source.gathered < 2:
        time.sleep(0.001)
    assert reader.state_dict()["consumed"] == 4
    for _ in range(10):
        next(reader)
    assert (reader.state_dict()["epoch"], reader.state_dict()["consumed"]) == (1, 4)
    reader.close()


def test_consumed_counts_all_ranks():
    reader = make_reader(Numbers(40), batch_size=8, rank=1, world_size=4, epochs=1)
    next(reader)
    next(reader)
    assert reader.state_dict()["consumed"] == 16
    reader.close()


def test_another_batch_size_goes_on_with_the_next_record():
    source = Numbers(40)
    reader = make_reader(source, batch_size=8)
    head = flat(slots(reader, 2))
    other = make_reader(source, batch_size=6, last="keep")
    other.load_state_dict(reader.state_dict())
    assert sorted(head + flat(slots(other))) == list(range(40))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1),
        ("order_key", "x"),
        ("content_digest", "x"),
        ("generation", 2),
        ("shuffle", "none"),
        ("filter", "label=3"),
        ("weights", [1, 2]),
    ],
)
def test_a_state_of_another_order_is_refused_by_name(name, value):
    reader = make_reader(Numbers(40))
    with pytest.raises(StateMismatch, match=name):
        reader.load_state_dict(reader.state_dict() | {name: value})
    with pytest.raises(StateMismatch, match=f"reader state: {name} is"):  # not the digest, which differs with it
        reader.load_state_dict(reader.state_dict() | {"order_key": "x", name: value})
    without = reader.state_dict()
    del without[name]
    with pytest.raises(StateMismatch, match=f"it has no {name}"):
        reader.load_state_dict(without)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("consumed", 41, "consumed is 41 there, and epoch 0 has 40 records"),
        ("consumed", -1, "consumed.*-1.*whole number"),
        ("consumed", "5", "consumed.*'5'.*whole number"),
        ("consumed", math.nan, "consumed.*nan.*whole number"),
        ("epoch", -1, "epoch.*-1.*whole number"),
        ("epoch", 1.5, "epoch.*1.5.*whole number"),
        ("epoch", None, "epoch.*None.*whole number"),
        ("batch_size", 0, "batch_size.*0.*whole number, at least 1"),
        ("batch_size", "4", "batch_size.*'4'.*whole number"),
    ],
)
def test_a_state_that_no_reader_can_be_in_is_refused(key, value, said):
    reader = make_reader(Numbers(40))
    with pytest.raises(StorageError, match=said):
        reader.load_state_dict(reader.state_dict() | {key: value})
    without = reader.state_dict()
    del without[key]
    with pytest.raises(StateMismatch, match=f"it has no {key}"):
        reader.load_state_dict(without)


def test_a_state_can_be_loaded_while_reading():
    reader = make_reader(Numbers(40))
    start = reader.state_dict()
    whole = slots(reader)
    reader.load_state_dict(start)
    assert slots(reader, 3) == whole[:3]
    reader.load_state_dict(start)
    assert slots(reader) == whole
    assert not threads()


@pytest.mark.parametrize("prefetch", [True, False])
def test_values_are_those_of_the_records_and_epochs_take_turns_over_the_draws(prefetch):
    reader = make_reader(Numbers(12, draws=2), epochs=3, prefetch=prefetch)
    met = []
    for batch in reader:
        assert (batch.image == batch.slot[:, None, None, None]).all()
        assert len(set(batch.draw)) == 1
        assert not batch.store.any()
        expected = (batch.slot + batch.draw / 10).astype(np.float16).astype(np.float32)
        assert (batch.noise == expected[:, None, None, None]).all()
        assert batch.image.dtype == batch.noise.dtype == np.float32
        assert batch.label.tolist() == [-1] * 4
        met.append((batch.epoch, batch.draw[0]))
    assert met == [(0, 0)] * 3 + [(1, 1)] * 3 + [(2, 0)] * 3


def test_a_device_gives_tensors():
    for batch in make_reader(Numbers(8), device="cpu"):
        assert batch.image.dtype == batch.noise.dtype == torch.float32
        assert batch.label.dtype == batch.slot.dtype == torch.int64
        assert torch.equal(batch.image[:, 0, 0, 0], batch.slot.float())


def test_an_error_while_reading_ahead_reaches_the_consumer_after_the_good_batches():
    reader = make_reader(Numbers(40, broken=9), shuffle=None)
    assert slots(reader, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for _ in range(2):
        with pytest.raises(StorageError, match="row 9 is broken"):
            next(reader)
    assert reader.state_dict()["consumed"] == 8
    assert not threads()


def test_threads_end_with_the_epoch_with_close_and_with_the_reader():
    list(make_reader(Numbers(40)))
    assert not threads()
    reader = make_reader(Numbers(40), epochs=None)
    next(reader)
    assert len(threads()) == 1
    reader.close()
    assert not threads()
    reader = make_reader(Numbers(40), epochs=None)
    next(reader)
    del reader
    gc.collect()
    assert not threads()
    for _ in make_reader(Numbers(40), epochs=None):
        break
    gc.collect()
    assert not threads()


def test_an_ended_reader_stays_ended():
    reader = make_reader(Numbers(8))
    assert len(list(reader)) == 2
    assert list(reader) == []


def test_the_wait_is_measured():
    reader = make_reader(Numbers(40))
    list(reader)
    assert 0 < reader.wait_seconds < 10


def test_a_world_size_that_nobody_set_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StorageError, match="WORLD_SIZE is 2"):
        make_reader(Numbers(40))
    assert make_reader(Numbers(40), rank=1, world_size=2).rank == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert make_reader(Numbers(40)).world_size == 1


def test_torch_distributed_gives_rank_and_world_size(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/join", rank=0, world_size=1)
    try:
        assert make_reader(Numbers(40)).world_size == 1
        with pytest.raises(StorageError, match="rank 0 of 1, the arguments rank 1 of 2"):
            make_reader(Numbers(40), rank=1, world_size=2)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "rank": 0, "world_size": 2}, "make it a multiple of 2"),
        ({"batch_size": 41}, "exceeds the 40 records"),
        ({"batch_size": 0}, "at least 1"),
        ({"last": "pad"}, "must be"),
        ({"shuffle": "yes"}, "must be"),
        ({"rank": 0}, "both or neither"),
        ({"rank": 2, "world_size": 2}, r"outside 0\.\.1"),
    ],
)
def test_wrong_use_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_reader(Numbers(40), **options)


def test_float16_becomes_float32_without_rounding():
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    assert np.array_equal(to_float32(finite, (-1, 1)).view(np.int32), finite.astype(np.float32).view(np.int32))
    assert np.array_equal(to_float32(every, (-1, 1)), every.astype(np.float32), equal_nan=True)


def test_a_batch_larger_than_the_store_takes_the_memory_of_the_store(make_store):
    store = PairStore.open(make_store())
    (batch,) = store.batches(10**9, last="keep")
    assert sorted(batch.slot.tolist()) == list(range(50))
    (batch,) = Mixture([(store, 1), (store, 1)]).batches(10**9, last="keep")
    assert len(batch) == 50


def test_no_record_is_lost_between_threads_of_a_real_store(make_store):
    store = PairStore.open(make_store())
    for _ in range(20):
        assert sorted(flat(slots(store.batches(7, last="keep")))) == list(range(50))


@pytest.mark.parametrize("prefetch", [True, False])
def test_threads_that_share_a_reader_take_a_batch_each_and_all_of_them_end(make_store, prefetch):
    reader = PairStore.open(make_store()).batches(5, epochs=8, prefetch=prefetch)
    slots = []

    def take():
        for batch in reader:
            slots.append((batch.epoch, *batch.slot.tolist()))

    takers = [threading.Thread(target=take) for _ in range(4)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join(PATIENCE)
    assert not any(taker.is_alive() for taker in takers)
    assert len(slots) == len(set(slots)) == 80
