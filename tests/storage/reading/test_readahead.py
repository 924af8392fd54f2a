"""Shards are in memory before they are gathered, one window ahead, and never more than two windows of them."""

from __future__ import annotations

import gc
import mmap
import os
import sys
import threading
import time
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.store.disk import resident
from nfm.storage import CorruptShard, Mixture, PairStore, StorageError
from nfm.storage.layouts.mapped import Mapped
from nfm.storage.reading.ahead import shards
from nfm.storage.reading.ahead.shards import ReadAhead
from nfm.storage.reading.stream import StoreStream, plan
from tests.storage.reading.running import threads

ROWS, SHARD, WINDOW = 960, 20, 4


class Shelf:
    """A source that keeps a record of the shards that it was asked for."""

    generation, noise_step, remote, draws = None, None, False, 2
    order_key = content_digest = "shelf"
    value_range = (0.0, 1.0)
    rows_per_shard = SHARD

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken
        self.asked: list[tuple[int, int]] = []
        self.ready = threading.Event()
        self.ready.set()

    def __len__(self):
        return ROWS

    def shard(self, draw, number):
        self.ready.wait()
        if number == self.broken:
            raise StorageError(f"shard {number} is broken")
        self.asked.append((draw, number))
        return SimpleNamespace(maps=[])


def shards_of(records) -> set[tuple[int, int]]:
    return set(zip(records.draw.tolist(), (records.slot // SHARD).tolist()))


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (0, 4), (2, 4)])
def test_every_shard_is_in_before_its_batch_and_at_most_two_windows_are(rank, world):
    source = Shelf()
    stream = StoreStream(source, 0, "windowed", WINDOW)
    assert stream.lookahead == WINDOW * SHARD
    ahead, plans = ReadAhead([source], stream.lookahead // 16), list(plan(stream, 16, False, 2, 0, 0, rank, world))
    last = {shard: number for number, planned in enumerate(plans) for shard in shards_of(planned.records)}
    for number, planned in enumerate(ahead.over(iter(plans))):
        assert planned is plans[number]
        assert shards_of(planned.records) <= set(source.asked)
        held = [shard for shard in set(source.asked) if last[shard] >= number]
        assert len(held) <= 2 * WINDOW + 1  # a batch may span two windows
    ahead.stop()
    if world == 1:  # of several, one may come back to the shards at the edges of its part
        assert len(source.asked) == 2 * ROWS // SHARD
    assert not threads()


def test_a_batch_waits_for_its_shards():
    source = Shelf()
    source.ready.clear()
    stream = StoreStream(source, 0, "windowed", WINDOW)
    ahead, got = ReadAhead([source], 5), []
    thread = threading.Thread(target=lambda: got.append(next(ahead.over(plan(stream, 16, False, 1, 0, 0)))))
    thread.start()
    time.sleep(0.05)
    assert not got
    source.ready.set()
    thread.join(10)
    assert len(got[0].records.slot) == 16
    ahead.stop()


def test_an_error_comes_with_the_batch_that_needs_the_shard():
    source = Shelf(broken=7)
    stream = StoreStream(source, 0, None, 1)
    ahead = ReadAhead([source], 4)
    plans = ahead.over(plan(stream, SHARD, False, 1, 0, 0))
    assert [next(plans).records.slot[0] // SHARD for _ in range(7)] == list(range(7))
    with pytest.raises(StorageError, match="shard 7 is broken"):
        next(plans)
    ahead.stop()


def test_stopping_ends_the_threads_and_whoever_waits():
    source = Shelf()
    source.ready.clear()
    stream = StoreStream(source, 0, "windowed", WINDOW)
    ahead, ended = ReadAhead([source], 40), []

    def wait() -> None:
        try:
            next(ahead.over(plan(stream, 16, False, 1, 0, 0)))
        except BaseException as error:
            ended.append(type(error).__name__)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not ahead._found:
        time.sleep(0.001)
    stopping = threading.Thread(target=ahead.stop)
    stopping.start()
    source.ready.set()  # the shards that were being read come to their end
    stopping.join(10)
    waiting.join(10)
    assert ended in (["CancelledError"], [])
    assert not threads()


@pytest.mark.parametrize("shuffle", ["windowed", None])
@pytest.mark.parametrize("prefetch", [True, False])
def test_a_windowed_reader_reads_the_same_with_and_without_files_in_memory(make_store, shuffle, prefetch):
    store = PairStore.open(make_store())
    for number in range(3):
        with open(store.shard(0, number).maps[0].path, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    seen = []
    for batch in store.batches(7, shuffle=shuffle, window=1, last="keep", epochs=2, prefetch=prefetch):
        assert np.array_equal(batch.noise, store.gather(batch.epoch, batch.slot)["noise"].astype(np.float32))
        seen += batch.slot.tolist()
    assert sorted(seen[:50]) == sorted(seen[50:]) == list(range(50))
    assert not threads()


def test_a_window_of_more_shards_than_there_are_is_the_whole_draw(make_store):
    store = PairStore.open(make_store())
    whole, vast = (store.stream(0, "windowed", window, None) for window in (3, 2**60))
    assert whole.lookahead == vast.lookahead == 60  # three shards of 20 at most
    assert len(list(store.batches(6, shuffle="windowed", window=2**60, last="keep"))) == 9
    with pytest.raises(ValueError, match=r"window is .*: it must be a whole number, 1 to 9223372036854775807"):
        store.batches(6, shuffle="windowed", window=2**63)


def test_a_windowed_reader_dropped_in_the_middle_leaves_no_thread(make_store):
    store = PairStore.open(make_store())
    for source in (store, Mixture([(store, 1), (store, 2)])):
        for prefetch in (True, False):
            reader = source.batches(6, shuffle="windowed", window=1, epochs=None, prefetch=prefetch)
            next(reader)
            assert threads()
            del reader
            gc.collect()
            assert not threads()


def test_full_order_of_a_local_store_starts_no_thread_but_the_readers(make_store):
    reader = PairStore.open(make_store()).batches(6)
    next(reader)
    assert [thread.name for thread in threads()] == ["nfm-reader"]
    reader.close()


def test_two_at_a_time_resume_behind_the_last_that_was_yielded(large_store):
    whole = [batch.image.tobytes() for batch in large_store.batches(64, 0, epochs=3)]
    with large_store.batches(64, 0, epochs=3) as reader:
        next(reader)
        state = reader.state_dict()
    again = large_store.batches(64, 0, epochs=3)
    again.load_state_dict(state)
    assert [batch.image.tobytes() for batch in again] == whole[1:]


def test_two_at_a_time_raise_after_the_good_batches_and_end_with_the_reader(large_store):
    reader = large_store.batches(60, 0, epochs=None, shuffle=None)
    assert len(list(islice(reader, 2))) == 2
    assert any(thread.name.startswith("nfm-filler") for thread in threads())
    reader.close()
    assert not threads()
    (large_store.root / large_store.sealed.shards[2].payload.path).unlink()
    reader = PairStore.open(large_store.root).batches(50, 0, shuffle=None, last="keep")
    assert [len(batch) for batch in islice(reader, 2)] == [50, 50]
    with pytest.raises(StorageError, match="s00002"):
        next(reader)
    assert not threads()


def test_a_shard_that_vanishes_is_named(make_store):
    root = make_store()
    store = PairStore.open(root)
    path = root / store.sealed.shards[1].payload.path
    path.unlink()
    with pytest.raises(StorageError, match=path.name):
        list(store.batches(6, shuffle="windowed", window=1))
    assert not threads()


@pytest.mark.parametrize("linux", ["this", "before 5.14"])
def test_a_file_is_brought_into_memory(tmp_path, monkeypatch, linux):
    path = tmp_path / "large"
    path.write_bytes(os.urandom(1 << 20) * 9)
    if linux != "this":
        monkeypatch.setattr(shards, "_MADV_POPULATE_READ", 9999)
    with open(path, "rb") as opened:
        os.fdatasync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if resident(path) == 1:
            pytest.skip("this file system does not let go of its pages")
        buffer = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        from_disk = shards.read_through(Mapped.of(path, buffer), threading.Event())
        assert from_disk or linux != "this"
        assert resident(path) == 1
        assert not shards.read_through(Mapped.of(path, buffer), threading.Event())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the process would be killed")
def test_a_file_that_was_cut_after_it_was_opened_is_named(tmp_path):
    path = tmp_path / "cut"
    path.write_bytes(bytes(1 << 20))
    with open(path, "rb") as opened:
        buffer = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    os.truncate(path, 1000)
    with pytest.raises(CorruptShard, match="cut: cannot be read"):
        shards.read_through(Mapped.of(path, buffer), threading.Event())
