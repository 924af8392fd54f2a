"""The keyed order: every record once, whatever the sizes, and the same forever."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfm.storage.order import Order, order_key, permute, permute_windowed


def make_order(rows: int, batch_size: int, shuffle="full", rows_per_shard: int = 7, window: int = 3, last="keep"):
    return Order("key", rows, rows_per_shard, 0, batch_size, shuffle, window, last)


@given(st.integers(1, 3000), st.text(max_size=5))
def test_the_order_is_a_bijection_of_any_size(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(st.integers(1, 500), st.integers(1, 60), st.integers(1, 9), st.integers(0, 5))
def test_the_windowed_order_is_a_bijection_that_stays_in_its_window(n, rows_per_shard, window, key):
    rows = permute_windowed(np.arange(n), n, rows_per_shard, window, str(key))
    assert np.array_equal(np.sort(rows), np.arange(n))
    shards = rows // rows_per_shard
    met: list[set[int]] = []  # the shards of each window, in the order they are met
    for shard in shards.tolist():
        if not met or (shard not in met[-1] and len(met[-1]) == window):
            met.append(set())
        met[-1].add(shard)
    assert not any(a & b for a, b in pairwise(met))


@given(st.integers(1, 10**15), st.integers(0, 10**15))
def test_a_single_position_is_permuted_without_the_others(n, position):
    index = np.array([position % n])
    assert 0 <= permute(index, n, "k")[0] < n
    many = np.minimum(np.array([position % n, 0, n - 1]), n - 1)
    assert permute(many, n, "k")[0] == permute(index, n, "k")[0]


def test_the_order_never_changes():
    assert permute(np.arange(10), 10, "key").tolist() == ORDER_OF_10
    assert permute(np.array([0, 59999]), 60000, "key").tolist() == ORDER_OF_60000
    assert permute_windowed(np.arange(10), 10, 2, 2, "key").tolist() == WINDOWED_10
    assert order_key("ab", 10, 2) == ORDER_KEY


@pytest.mark.parametrize("n", [3, 5, 10, 64, 1000])
def test_every_row_is_as_likely_at_every_position(n):
    keys = 2000
    positions = np.array([0, n // 2, n - 1])
    seen = np.array([permute(positions, n, f"{key}") for key in range(keys)])
    cells = min(n, 16)
    for column in seen.T:
        counts = np.bincount(column * cells // n, minlength=cells)
        sizes = np.bincount(np.arange(n) * cells // n, minlength=cells)
        expected = keys * sizes / n
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < cells - 1 + 5 * np.sqrt(2 * (cells - 1))


def test_neighbours_do_not_stay_neighbours():
    rows = permute(np.arange(60000), 60000, "key")
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.02
    assert (np.abs(np.diff(rows)) == 1).mean() < 1e-3


@given(
    st.integers(1, 400),
    st.integers(1, 50),
    st.sampled_from(["full", "windowed", None]),
    st.integers(0, 400),
)
def test_batches_after_any_count_hold_every_remaining_record_once(rows, batch_size, shuffle, consumed):
    order = make_order(rows, batch_size, shuffle)
    whole = order.at(2, np.arange(rows))
    batches = list(order.batches(2, consumed))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    for number, batch in enumerate(batches):
        start = consumed + number * batch_size
        assert np.array_equal(batch, np.sort(whole[start : start + batch_size]))
    assert sum(map(len, batches)) == max(0, rows - consumed)


def test_dropping_the_last_batch_leaves_full_ones_only():
    assert [len(batch) for batch in make_order(50, 16, last="drop").batches(0, 0)] == [16, 16, 16]
    assert [len(batch) for batch in make_order(50, 16, last="drop").batches(0, 32)] == [16]
    assert [len(batch) for batch in make_order(50, 16, last="drop").batches(0, 48)] == []
    assert [len(batch) for batch in make_order(50, 16).batches(0, 0)] == [16, 16, 16, 2]


def test_epochs_and_seeds_differ():
    order = make_order(1000, 10)
    other = Order("key", 1000, 7, 1, 10, "full", 3, "keep")
    orders = [order.at(0, np.arange(1000)), order.at(1, np.arange(1000)), other.at(0, np.arange(1000))]
    assert all((a == b).mean() < 0.02 for a, b in pairwise(orders))


def test_the_order_key_names_source_rows_and_draws():
    keys = {order_key("a", 10, 1), order_key("b", 10, 1), order_key("a", 11, 1), order_key("a", 10, 2)}
    assert len(keys) == 4


def test_a_position_outside_is_refused():
    with pytest.raises(IndexError, match=r"0\.\.9"):
        permute(np.array([10]), 10, "key")


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"shuffle": "yes"}, {"last": "pad"}, {"window": 0, "shuffle": "windowed"}]
)
def test_options_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        make_order(**({"rows": 10, "batch_size": 2} | wrong))


ORDER_OF_10 = [3, 5, 1, 9, 0, 6, 4, 8, 7, 2]
ORDER_OF_60000 = [20602, 57492]
WINDOWED_10 = [1, 7, 6, 0, 5, 8, 4, 9, 2, 3]
ORDER_KEY = "8c36856a6b777c57e1ec901e4d64c9e7273e8660a650c46e7607d256bde2f9d1"
