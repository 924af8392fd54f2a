"""Conversion to float32: the plain formula's bits, for every stored number and every shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfm.storage.format.convert import scale_of, to_float32

UNIT = (-1.0, 1.0)
PATTERNS = np.arange(65536, dtype=np.uint16).view(np.float16)


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint32)


def plain(stored: np.ndarray, value_range: tuple[float, float], step: float | None) -> np.ndarray:
    """The formula, in as many passes as it has operations."""
    wide = stored.astype(np.float32)
    if stored.dtype == np.uint8:
        a, b = scale_of(value_range)
        return wide * np.float32(a) + np.float32(b)
    return wide if step is None or stored.dtype.kind == "f" else wide * np.float32(step)


def test_every_float16_keeps_its_value_bit_for_bit() -> None:
    for copies in (1, 5):  # in one chunk, and in several that all hold infinities
        stored = np.tile(PATTERNS, copies)
        np.testing.assert_array_equal(bits(to_float32(stored, UNIT)), bits(stored.astype(np.float32)))


def test_every_finite_float16_takes_the_fast_way_to_the_same_bits() -> None:
    finite = PATTERNS[np.isfinite(PATTERNS)]
    np.testing.assert_array_equal(bits(to_float32(finite, UNIT)), bits(finite.astype(np.float32)))
    for lone in (np.inf, -np.inf, np.nan):
        mixed = np.concatenate([finite, finite, np.array([lone], np.float16)])
        np.testing.assert_array_equal(bits(to_float32(mixed, UNIT)), bits(mixed.astype(np.float32)))


def test_torch_widens_every_float16_to_the_same_bits_and_nan_to_nan() -> None:
    pytest.importorskip("torch")
    wide = to_float32(PATTERNS, UNIT, torch=True)
    number = ~np.isnan(PATTERNS)
    np.testing.assert_array_equal(bits(wide[number]), bits(PATTERNS[number].astype(np.float32)))
    assert np.isnan(wide[~number]).all()


def test_every_uint8_and_every_step_number_has_the_formulas_bits() -> None:
    for value_range in (UNIT, (0.0, 1.0), (-0.3, 7.7)):
        stored = np.arange(256, dtype=np.uint8)
        np.testing.assert_array_equal(bits(to_float32(stored, value_range)), bits(plain(stored, value_range, None)))
    for stored, step in (
        (np.arange(-128, 128).astype(np.int8), 1 / 20),
        (np.arange(-32768, 32768).astype(np.int16), 1 / 64),
    ):
        np.testing.assert_array_equal(bits(to_float32(stored, UNIT, step=step)), bits(plain(stored, UNIT, step)))


def test_a_uint8_at_the_ends_of_its_range_is_the_end_of_the_value_range() -> None:
    assert to_float32(np.array([0, 255], np.uint8), UNIT).tolist() == [-1.0, 1.0]


@given(
    dtype=st.sampled_from(["uint8", "int8", "int16", "float16", "float32", "int64"]),
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    repeat=st.sampled_from([1, 700]),
    torch=st.booleans(),
    own_out=st.booleans(),
    strided=st.booleans(),
    step=st.sampled_from([None, 1 / 20]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_stride_and_any_out_has_the_formulas_bits(
    dtype: str,
    shape: list[int],
    repeat: int,
    torch: bool,
    own_out: bool,
    strided: bool,
    step: float | None,
    seed: int,
) -> None:
    numbers = np.random.default_rng(seed).normal(0, 30, (repeat, *shape))
    if dtype == "uint8":
        numbers = np.abs(numbers)
    stored = np.asarray(numbers.clip(-127, 255 if dtype == "uint8" else 127)).astype(dtype)
    expected = plain(stored, UNIT, None if dtype == "int64" else step)
    out = np.full(stored.shape, 7, np.float32) if own_out else None
    if strided:
        stored = np.repeat(stored, 2, axis=0)[::2]
        out = np.full((2 * repeat, *shape), 7, np.float32)[::2] if own_out else None
    result = to_float32(stored, UNIT, out, step, torch=torch)
    assert out is None or result is out
    np.testing.assert_array_equal(bits(result), bits(expected))


def test_an_out_of_another_shape_or_type_is_refused() -> None:
    stored = np.zeros((2, 3), np.uint8)
    for out in (np.empty((3, 2), np.float32), np.empty((2, 3), np.float64)):
        with pytest.raises(ValueError, match="pass float32"):
            to_float32(stored, UNIT, out)


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_gives_the_same_bits_with_any_number_of_threads(threads: int) -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    stored = np.tile(PATTERNS[np.isfinite(PATTERNS)], 2)  # more than a chunk
    torch.set_num_threads(threads)
    try:
        wide = to_float32(stored, UNIT, torch=True)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(wide.view(np.int32), stored.astype(np.float32).view(np.int32))
