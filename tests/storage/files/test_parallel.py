"""The ordered map on threads: order, bounds, errors at their place, and an end when the caller ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from nfm.storage.files.parallel import parallel

PATIENCE = 60.0


def test_results_come_in_the_order_of_the_items_whichever_is_ready_first() -> None:
    second_done = threading.Event()

    def action(item: int) -> int:
        if item == 0:
            assert second_done.wait(PATIENCE)
        if item == 1:
            second_done.set()
        return 10 * item

    assert list(parallel(action, range(20), threads=2)) == [10 * item for item in range(20)]
    assert list(parallel(action, [], threads=2)) == []


def test_only_so_many_items_are_taken_before_their_results_are() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    results = parallel(lambda item: item, items(), threads=2, ahead=5)
    assert next(results) == 0
    assert len(taken) == 5
    assert next(results) == 1
    assert len(taken) == 6
    results.close()
    assert len(taken) == 6


def test_an_error_comes_at_its_items_place_and_ends_the_rest() -> None:
    before, begun = set(threading.enumerate()), list[int]()
    stop = threading.Event()

    def action(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise ValueError("item 3 is broken")
        if item > 3:  # long work, which ends because it looks
            assert stop.wait(PATIENCE)
        return item

    results = parallel(action, range(100), threads=2, ahead=8, stop=stop)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="item 3 is broken"):
        next(results)
    assert stop.is_set()
    assert max(begun) < 12  # of a hundred: what was not begun never is
    assert set(threading.enumerate()) <= before


def test_the_callers_interrupt_ends_what_runs() -> None:
    begun, stop = threading.Barrier(4), threading.Event()
    ended: list[int] = []

    def action(item: int) -> None:
        if item == 0:
            return
        if item <= 3:
            begun.wait(PATIENCE)
        assert stop.wait(PATIENCE)
        ended.append(item)

    results = parallel(action, range(100), threads=3, ahead=6, stop=stop)
    next(results)
    begun.wait(PATIENCE)  # all three threads are at work
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)
    assert {1, 2, 3} <= set(ended) <= set(range(1, 7))  # what was not begun never is
