"""Codecs of the noise: what they keep, what they clip, and that clipped values are counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nfm.storage import layouts
from nfm.storage.errors import StorageError
from nfm.storage.format.codecs import CODECS, pack, unpack
from nfm.storage.format.moments import MomentSums
from nfm.storage.format.spec import write_spec
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.shard_writer import write_shard


@given(hnp.arrays(np.float32, st.integers(0, 50), elements=st.floats(-1000, 1000, width=32)))
@pytest.mark.parametrize("codec", ["int8"])
def test_steps_are_within_half_a_step_and_clipped_symmetrically(codec: str, noise: np.ndarray) -> None:
    stored, clipped = pack(noise, codec)
    step, limit = CODECS[codec].step, CODECS[codec].limit
    assert stored.dtype == CODECS[codec].dtype
    back = unpack(stored, step)
    within = np.abs(noise) <= limit * step
    assert np.abs(back - noise)[within].max(initial=0) <= step / 2 * 1.001
    np.testing.assert_array_equal(stored[noise > (limit + 0.5) * step], limit)
    np.testing.assert_array_equal(stored[noise < -(limit + 0.5) * step], -limit)
    assert clipped == np.count_nonzero(np.abs(np.rint(noise * np.float32(1 / step))) > limit)
    np.testing.assert_array_equal(pack(-noise, codec)[0], -stored)


@pytest.mark.parametrize("codec", ["int8"])
def test_what_was_decoded_encodes_to_the_same_bytes(codec: str) -> None:
    info = np.iinfo(CODECS[codec].dtype)
    every = np.arange(-info.max, info.max + 1).astype(info.dtype)
    again, clipped = pack(unpack(every, CODECS[codec].step), codec)
    np.testing.assert_array_equal(again, every)
    assert clipped == 0


def test_floats_keep_their_values() -> None:
    noise = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    for codec in ("float32", "float16"):
        stored, clipped = pack(noise, codec)
        np.testing.assert_array_equal(unpack(stored, None), noise.astype(codec))
        assert clipped == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_noise_that_is_not_finite_has_no_number_of_steps(value: float) -> None:
    with pytest.raises(StorageError, match="1 values"):
        pack(np.array([0.0, value], np.float32), "int8")


@pytest.mark.parametrize("dtype", [np.float16, np.int8, np.int16])
def test_moments_that_are_counted_are_those_that_are_summed(dtype: type) -> None:
    values = np.random.default_rng(1).normal(size=1 << 17) * (1 if dtype == np.float16 else 30)
    values = values.astype(dtype)
    step = None if dtype == np.float16 else 1 / 20
    counted, summed = MomentSums(), MomentSums()
    counted.add(values, step)
    for part in np.split(values, 64):
        summed.add(part, step)
    assert counted.result() == pytest.approx(summed.result(), rel=1e-9)
    expected = values.astype(np.float64) * (step or 1)
    assert counted.result()["var"] == pytest.approx(expected.var(), rel=1e-9)


def test_counted_moments_leave_out_what_is_not_finite() -> None:
    values = np.ones(1 << 17, np.float16)
    values[:3] = np.nan, np.inf, -np.inf
    sums = MomentSums()
    sums.add(values)
    assert sums.result()["nonfinite"] == 3
    assert sums.result()["max"] == 1


def test_a_store_counts_the_clipped_and_its_moments_are_those_of_the_stored_noise(
    tmp_path: Path, spec_of, records
) -> None:
    spec = dataclasses.replace(spec_of("blocks", "int8"), rows=40)
    write_spec(tmp_path, spec)

    def loud(shard: int):
        for chunk in records(spec, 0, shard):
            chunk["noise"][:, 0, 0, 0] = -50.0
            yield chunk

    for shard in range(2):
        commits.publish(tmp_path, write_shard(tmp_path, spec, 0, shard, "a", loud(shard)))
    body = seal.seal(tmp_path, 1)
    assert [commit.clipped for commit in commits.committed(tmp_path, 1).values()] == [20, 20]
    assert body["clipped"] == 40
    entry = body["shards"][0]
    file = tmp_path / layouts.files(spec, entry)[0].path
    noise = layouts.open_shard(spec, [file], 20).read("noise", 0, 20)
    assert noise.dtype == np.int8
    assert noise.min() == -127
    decoded = unpack(noise, spec.noise_step).astype(np.float64)
    moments = commits.read(tmp_path, entry["name"]).moments
    assert moments["var"] == pytest.approx(decoded.var(), rel=1e-6)
    assert moments["min"] == pytest.approx(-6.35)


def test_int8_noise_that_is_not_finite_is_refused_with_its_place(tmp_path: Path, spec_of, records) -> None:
    spec = spec_of("blocks", "int8")
    chunks = list(records(spec, 0, 0))
    chunks[1]["noise"][0] = np.inf
    with pytest.raises(StorageError, match=r"16 values of the noise are not finite from slot 7 on; check what"):
        write_shard(tmp_path, spec, 0, 0, "a", chunks)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
