"""The keyed order: every record once, whatever the sizes, and the same forever."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfm.storage.format.order import Order, Windows, order_key, permute, shard_counts

counts_of_shards = st.lists(st.integers(1, 40), min_size=1, max_size=30).map(lambda counts: np.array(counts, np.int64))


def windowed(n: int, rows_per_shard: int, window: int, key: str) -> np.ndarray:
    return Windows(shard_counts(n, rows_per_shard), window, key)(np.arange(n))


@given(st.integers(1, 3000), st.text(max_size=5))
def test_the_order_is_a_bijection_of_any_size(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(st.integers(1, 500), st.integers(1, 60), st.integers(1, 9), st.integers(0, 5))
def test_the_windowed_order_is_a_bijection_that_stays_in_its_window(n, rows_per_shard, window, key):
    rows = windowed(n, rows_per_shard, window, str(key))
    assert np.array_equal(np.sort(rows), np.arange(n))
    check_windows(rows // rows_per_shard, window)


@given(counts_of_shards, st.integers(1, 9), st.integers(0, 5))
def test_shards_of_any_size_are_windowed_too(counts, window, key):
    n = int(counts.sum())
    rows = Windows(counts, window, str(key))(np.arange(n))
    assert np.array_equal(np.sort(rows), np.arange(n))
    check_windows(np.searchsorted(np.cumsum(counts), rows, side="right"), window)
    some = np.random.default_rng(key).permutation(n)[: n // 2]
    assert np.array_equal(Windows(counts, window, str(key))(some), rows[some])


def check_windows(shards: np.ndarray, window: int) -> None:
    """Shards, by position: each `window` of them are met together and never again."""
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
    assert windowed(10, 2, 2, "key").tolist() == WINDOWED_10
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


def test_epochs_and_seeds_differ():
    counts = shard_counts(1000, 7)
    for shuffle in ("full", "windowed"):
        orders = [Order("key", seed, shuffle, 3).epoch(epoch, counts) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
        assert all((a == b).mean() < 0.02 for a, b in pairwise(order(np.arange(1000)) for order in orders))


def test_no_shuffle_is_the_order_of_the_shards():
    positions = np.array([5, 0, 9])
    assert Order("key", shuffle=None).epoch(3, shard_counts(10, 3))(positions).tolist() == [5, 0, 9]


def shuffling(rows: np.ndarray) -> dict[str, float]:
    """How well an epoch is mixed, from the order of its rows (a permutation of 0..n-1).

    `correlation`: Spearman's rank correlation of position and row, 0 when mixed. `displacement`: how far a row is
    from its own place on average, as a share of n; 1/3 when mixed. `separation`: how far apart rows that are
    stored next to each other come, as a share of n; 1/3 when mixed, a third of a window's share when windowed.
    """
    n = len(rows)
    position = np.empty(n, np.int64)
    position[rows] = np.arange(n)
    return {
        "correlation": float(np.corrcoef(np.arange(n), rows)[0, 1]),
        "displacement": float(np.abs(position - np.arange(n)).mean() / n),
        "separation": float(np.abs(np.diff(position)).mean() / n),
    }


@pytest.mark.parametrize("seed", range(4))
def test_full_order_mixes_as_well_as_chance(seed):
    n = 50_000
    mixed = shuffling(Order("key", seed).epoch(0, shard_counts(n, 500))(np.arange(n)))
    assert abs(mixed["correlation"]) < 5 / np.sqrt(n)
    assert abs(mixed["displacement"] - 1 / 3) < 5 * 0.24 / np.sqrt(n)  # |u - v| of uniforms: deviation 0.236
    assert abs(mixed["separation"] - 1 / 3) < 5 * 0.24 / np.sqrt(n)


@pytest.mark.parametrize("window", [1, 4, 16])
def test_windowed_order_mixes_as_well_as_its_window_allows(window):
    n, each = 50_000, 500
    orders = [Order("key", seed, "windowed", window).epoch(0, shard_counts(n, each)) for seed in range(4)]
    for mixed in (shuffling(order(np.arange(n))) for order in orders):
        assert abs(mixed["correlation"]) < 5 / np.sqrt(n / each)  # the shards are mixed in full
        assert abs(mixed["displacement"] - 1 / 3) < 5 * 0.24 / np.sqrt(n / each)
        assert mixed["separation"] > 0.95 * window * each / n / 3


def test_the_order_key_names_source_rows_and_draws():
    keys = {order_key("a", 10, 1), order_key("b", 10, 1), order_key("a", 11, 1), order_key("a", 10, 2)}
    assert len(keys) == 4


def test_a_position_outside_is_refused():
    with pytest.raises(IndexError, match=r"0\.\.9"):
        permute(np.array([10]), 10, "key")


@pytest.mark.parametrize("wrong", [{"shuffle": "yes"}, {"window": 0, "shuffle": "windowed"}])
def test_options_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        Order("key", **wrong)


ORDER_OF_10 = [3, 5, 1, 9, 0, 6, 4, 8, 7, 2]
ORDER_OF_60000 = [20602, 57492]
WINDOWED_10 = [1, 7, 6, 0, 5, 8, 4, 9, 2, 3]
ORDER_KEY = "8c36856a6b777c57e1ec901e4d64c9e7273e8660a650c46e7607d256bde2f9d1"
