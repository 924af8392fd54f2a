"""Work ahead in a thread: the same items, bounded, errors passed on, no thread left running."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from nfm.stages.executors.overlap import Ahead, Stopwatch, running
from tests.support.patience import PATIENCE, until


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "nfm-ahead"]


def test_the_items_come_in_order_and_the_thread_ends() -> None:
    assert list(Ahead(iter(range(100)), depth=3)) == list(range(100))
    until(lambda: not threads())


def test_it_is_ahead_by_no_more_than_its_depth() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    taking = Ahead(items(), depth=2)
    with running(taking):
        assert next(taking) == 0
        until(lambda: len(made) == 4)  # one taken, two in the queue, one in hand
        time.sleep(0.05)
        assert len(made) == 4
    assert not threads()


def test_what_the_thread_raises_is_raised_here_after_what_it_made() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise InterruptedError

    taking = Ahead(items())
    assert next(taking) == 1
    with pytest.raises(InterruptedError):
        next(taking)
    with pytest.raises(StopIteration):
        next(taking)


@pytest.mark.parametrize("error", [ValueError, GeneratorExit])
def test_a_chain_that_is_given_up_in_the_middle_ends_all_its_threads_and_closes_their_sources(
    error: type[BaseException],
) -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            number = 0
            while True:
                yield number
                number += 1
        finally:
            closed.set()

    first = Ahead(items())
    second = Ahead(number * 2 for number in first)
    assert [next(second), next(second)] == [0, 2]
    with pytest.raises(error), running(second, first):
        raise error
    assert closed.is_set()
    assert not threads()


def test_an_interrupt_waits_for_nothing_that_is_in_hand() -> None:
    let_go = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        let_go.wait(PATIENCE)  # a batch of a large teacher
        yield 1

    first = Ahead(items())
    second = Ahead(iter(first))
    assert next(second) == 0
    with pytest.raises(KeyboardInterrupt), running(second, first):
        raise KeyboardInterrupt
    assert threads()
    let_go.set()
    until(lambda: not threads())


def test_a_consumer_can_look_without_waiting_for_long() -> None:
    let_go = threading.Event()

    def items() -> Iterator[int]:
        let_go.wait(PATIENCE)
        yield 1

    taking = Ahead(items())
    with running(taking):
        assert not taking.wait(0.01)
        let_go.set()
        assert taking.wait(PATIENCE)
        assert taking.take() == 1


def test_two_stages_in_a_chain_overlap() -> None:
    second_begun, first_used = threading.Event(), threading.Event()

    def make() -> Iterator[int]:
        yield 0
        second_begun.set()
        yield 1

    def use(items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item == 0:  # in hand until the next one is being made, which needs another thread
                assert second_begun.wait(PATIENCE)
                first_used.set()
            yield item

    assert list(Ahead(use(Ahead(make())))) == [0, 1]
    assert first_used.is_set()


def test_a_stopwatch_over_items_counts_their_making_and_not_their_use() -> None:
    watch, whole, use = Stopwatch(), Stopwatch(), Stopwatch()
    with whole:
        for _ in watch.over(time.sleep(0.01) for _ in range(5)):
            with use:
                time.sleep(0.02)
    assert 0.05 <= watch.seconds <= whole.seconds - use.seconds
