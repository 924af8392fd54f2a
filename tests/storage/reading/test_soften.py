"""Softened noise: the formula, and an eps that depends only on the record and the epoch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import DataLoader

from nfm.storage import DatasetWriter, ImageDataset, Mixture, PairStore, StateMismatch
from nfm.storage.format.fields import pair_fields
from nfm.storage.reading.soften import normals
from nfm.storage.reading.stream import Records
from tests.storage.reading.test_batch import Elsewhere

GOLDEN = [  # what students that stopped are resumed with
    "0x1.0da1020000000p+1",
    "0x1.8def620000000p-2",
    "-0x1.89c5c00000000p+0",
    "0x1.75bd360000000p-2",
    "-0x1.ce8a980000000p-3",
]
QUICK = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture
def store(make_store):
    return PairStore.open(make_store(draws=1))


def records(count: int, store: int = 0, draw: int = 0, epoch: int = 0, first: int = 0) -> Records:
    slots = np.arange(first, first + count)
    return Records(np.full_like(slots, store), np.full_like(slots, draw), slots, np.full_like(slots, epoch))


def seen(*readers) -> dict[tuple[int, int, int, int], bytes]:
    """The noise's bytes by (epoch of the reader, store, draw, slot)."""
    found = {}
    for reader in readers:
        for batch in reader:
            for number, slot in enumerate(batch.slot.tolist()):
                key = (batch.epoch, int(batch.store[number]), int(batch.draw[number]), slot)
                assert key not in found
                found[key] = np.asarray(batch.noise[number]).tobytes()
    return found


def test_eps_is_standard_normal_and_its_bits_stand():
    eps = normals(0, records(500), 4001)
    assert stats.kstest(eps.reshape(-1), "norm").pvalue > 1e-3
    assert abs(float(stats.kurtosis(eps, axis=None))) < 0.02
    assert abs(np.corrcoef(eps[:, :2000].reshape(-1), eps[:, 2001:].reshape(-1))[0, 1]) < 0.005
    assert abs(np.corrcoef(eps[1:, 7], eps[:-1, 7])[0, 1]) < 0.15
    assert 4.5 < np.abs(eps).max() < 6.7
    there = normals(5, records(1, store=1, draw=2, epoch=3, first=4), 5)
    assert [value.hex() for value in there[0].tolist()] == GOLDEN


def test_every_part_of_the_key_gives_another_eps():
    alone = normals(0, records(1), 64)
    others = [
        normals(1, records(1), 64),
        *(normals(0, records(1, **{part: 1}), 64) for part in ("store", "draw", "epoch", "first")),
    ]
    for number, one in enumerate([alone, *others]):
        for other in [alone, *others][:number]:
            assert not (one == other).any()


@pytest.mark.parametrize("codec", ["float16", "float32", "int8"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_softened_noise_is_the_formula(make_store, small_spec, codec, device):
    spec = replace(small_spec, codec=codec, fields=pair_fields((1, 4, 4), codec))
    store, rho = PairStore.open(make_store(draws=1, spec=spec)), 0.6
    plain = store.batches(10, seed=3, epochs=2)
    softened = store.batches(10, seed=3, epochs=2, soften=rho, device=device)
    for one, other in zip(plain, softened, strict=True):
        slots = one.slot
        which = Records(np.zeros_like(slots), one.draw, slots, np.full_like(slots, one.epoch))
        expected = math.sqrt(1 - rho**2) * one.noise + rho * normals(3, which, 16).reshape(one.noise.shape)
        np.testing.assert_allclose(np.asarray(other.noise), expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(other.image), one.image)
        np.testing.assert_array_equal(np.asarray(other.label), one.label)


def test_softened_noise_has_unit_variance_and_the_correlation_of_the_formula(make_store, small_spec):
    spec = replace(small_spec, rows=1000, rows_per_shard=500, codec="float32", fields=pair_fields((1, 8, 8), "float32"))
    store = PairStore.open(make_store(draws=1, spec=spec))
    z = next(store.batches(1000, shuffle=None)).noise.reshape(-1)
    for rho in (0.1, 0.5, 0.9, 0.999):
        softened = next(store.batches(1000, shuffle=None, soften=rho)).noise.reshape(-1)
        assert abs(softened.mean()) < 0.02
        assert abs(softened.var() - 1) < 0.03
        assert np.corrcoef(z, softened)[0, 1] == pytest.approx(math.sqrt(1 - rho**2), abs=0.015)


def test_nothing_changes_without_softening(store):
    assert seen(store.batches(10, soften=0.0)) == seen(store.batches(10))
    assert "soften" not in store.batches(10, soften=0.0).state_dict()


def test_every_epoch_has_a_fresh_eps(store):
    found = seen(store.batches(10, epochs=3, soften=0.5))
    for slot in range(50):
        assert len({found[epoch, 0, 0, slot] for epoch in range(3)}) == 3


@QUICK
@given(
    batch_size=st.sampled_from([6, 12, 18]),
    world=st.sampled_from([1, 2, 3]),
    stopped=st.integers(0, 8),
    mixed=st.booleans(),
    shuffle=st.sampled_from(["full", "windowed", None]),
    prefetch=st.booleans(),
)
def test_eps_is_the_same_at_any_batch_size_world_size_and_after_a_resume(
    make_pair, batch_size, world, stopped, mixed, shuffle, prefetch
):
    source = Mixture([(make_pair[0], 0.7), (make_pair[1], 0.3)]) if mixed else make_pair[0]
    options = {"seed": 1, "epochs": 2, "shuffle": shuffle, "window": 1, "last": "keep", "soften": 0.5}
    whole = seen(source.batches(10, **options))
    first = source.batches(10, **options)
    head = seen(batch for _, batch in zip(range(stopped), first))
    first.close()
    ranks = [
        source.batches(batch_size, rank=rank, world_size=world, prefetch=prefetch, **options) for rank in range(world)
    ]
    for reader in ranks:
        reader.load_state_dict(first.state_dict())
    assert head | seen(*ranks) == whole


@pytest.fixture
def make_pair(make_store, small_spec):
    """Two couplings of the same data, the second in int8."""
    spec = replace(small_spec, coupling="nfm", codec="int8", fields=pair_fields((1, 4, 4), "int8"))
    return PairStore.open(make_store(1)), PairStore.open(make_store(1, spec, "nfm"))


def test_a_data_loaders_workers_soften_as_the_reader_does(make_pair):
    for source in (make_pair[0], Mixture([(make_pair[0], 0.5), (make_pair[1], 0.5)])):
        options = {"epochs": 2, "last": "keep", "soften": 0.5}
        expected = [batch.noise for batch in source.batches(8, **options)]
        loader = DataLoader(source.as_torch_dataset(8, **options), batch_size=None, num_workers=2)
        for ours, theirs in zip(expected, loader, strict=True):
            np.testing.assert_array_equal(ours, theirs["noise"].numpy())


def test_a_device_of_its_own_memory_gets_the_same_bits(store, monkeypatch):
    host = seen(store.batches(10, soften=0.5))
    monkeypatch.setattr("nfm.storage.reading.reader.Upload", Elsewhere)
    assert seen(store.batches(10, device="cpu", soften=0.5)) == host


def test_a_small_member_of_a_mixture_has_a_fresh_eps_each_time_it_is_read(make_store, small_spec):
    small = replace(small_spec, source="cd" * 32, rows=20)
    mixture = Mixture([(PairStore.open(make_store(1)), 0.5), (PairStore.open(make_store(1, small, "small")), 0.5)])
    noises: dict[int, list[bytes]] = {}
    for batch in mixture.batches(10, epochs=1, soften=0.9):
        for number in np.flatnonzero(batch.store == 1):
            noises.setdefault(int(batch.slot[number]), []).append(batch.noise[number].tobytes())
    assert max(map(len, noises.values())) > 1, "some records came twice in one epoch of the mixture"
    assert all(len(set(each)) == len(each) for each in noises.values())


def test_a_state_of_another_rho_is_refused_loudly(store):
    options = {"seed": 1, "epochs": 2}
    state = {rho: store.batches(10, soften=rho, **options).state_dict() for rho in (0.0, 0.3, 0.5)}
    assert state[0.5]["soften"] == 0.5
    for there, here in ((0.3, 0.5), (0.0, 0.5), (0.5, 0.0)):
        with pytest.raises(StateMismatch, match=rf"soften is {there} there and {here} here; read with soften={there}"):
            store.batches(10, soften=here, **options).load_state_dict(state[there])
        with pytest.raises(StateMismatch, match="soften"):
            store.as_torch_dataset(10, soften=here, **options).load_state_dict(state[there])


def test_a_state_that_was_saved_before_there_was_softening_still_loads(store):
    state = {
        "order_key": store.order_key,
        "content_digest": store.content_digest,
        "generation": 1,
        "filter": None,
        "weights": None,
        "seed": 1,
        "shuffle": "full",
        "batch_size": 10,
        "epoch": 0,
        "consumed": 30,
    }
    reader = store.batches(10, seed=1)
    assert set(reader.state_dict()) == set(state)
    reader.load_state_dict(state)
    assert len(list(reader)) == 2


@pytest.mark.parametrize("rho", [-0.1, 1.0, 1.5, float("nan")])
def test_a_rho_outside_its_range_is_refused(store, rho):
    with pytest.raises(ValueError, match=r"soften is .*at least 0 and below 1"):
        store.batches(10, soften=rho)


def test_raw_noise_and_a_dataset_cannot_be_softened(store, tmp_path):
    with pytest.raises(ValueError, match="raw=True leaves it as stored"):
        store.batches(10, soften=0.5, raw=True)
    with pytest.raises(ValueError, match="raw=True leaves it as stored"):
        store.as_torch_dataset(10, soften=0.5, raw=True)
    writer = DatasetWriter(tmp_path / "data", name="toy", image_shape=(1, 2, 2), classes=["a"], rows_per_shard=16)
    writer.write_split("train", 4, [(np.zeros((4, 1, 2, 2), np.uint8), np.zeros(4, np.int64), list("abcd"))])
    writer.close([])
    with pytest.raises(ValueError, match="a dataset has none"):
        ImageDataset.open(tmp_path / "data").batches(2, soften=0.5)
