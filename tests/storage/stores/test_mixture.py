"""Mixtures: exact shares in every batch, every slot once where the data is the same, exact resume."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import chain

import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nfm.storage import Mixture, PairStore, StateMismatch, StorageError
from nfm.storage.format.fields import pair_fields
from nfm.storage.mixture import deal

QUICK = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
weights = st.lists(st.integers(1, 20), min_size=1, max_size=4).map(lambda w: [Fraction(x, sum(w)) for x in w])


@pytest.fixture
def pair(make_store, small_spec):
    """Two couplings of the same data, the second in float32."""
    spec = replace(small_spec, coupling="nfm", codec="float32", fields=pair_fields((1, 4, 4), "float32"))
    return PairStore.open(make_store()), PairStore.open(make_store(2, spec, "nfm"))


@pytest.fixture
def strangers(make_store, small_spec):
    """Stores of different data, sizes and numbers of draws."""
    spec = replace(small_spec, source="cd" * 32, rows=30)
    return PairStore.open(make_store(name="large")), PairStore.open(make_store(1, spec, "small"))


def records(reader) -> list[list[tuple[int, int, int]]]:
    return [list(zip(b.store.tolist(), b.draw.tolist(), b.slot.tolist())) for b in reader]


@given(weights, st.integers(0, 10**9), st.integers(1, 500))
def test_any_positions_in_a_row_hold_each_members_share(shares, start, count):
    store, turn = deal(np.arange(start, start + count), shares)
    for number, share in enumerate(shares):
        assert abs(int((store == number).sum()) - count * share) <= number + 1
        mine = turn[store == number]
        assert np.array_equal(mine, np.arange(mine[0], mine[0] + len(mine)) if len(mine) else mine)


@given(weights, st.integers(1, 300))
def test_turns_count_from_zero(shares, count):
    store, turn = deal(np.arange(count), shares)
    for number in range(len(shares)):
        assert turn[store == number].tolist() == list(range(int((store == number).sum())))


def test_every_batch_holds_the_exact_share(pair):
    mixture = Mixture([(pair[0], 0.8), (pair[1], 0.2)])
    for batch in mixture.batches(10, epochs=3):
        assert np.bincount(batch.store).tolist() == [8, 2]
    assert mixture.batches(10).state_dict()["weights"] == [0.8, 0.2]
    assert Mixture([(pair[0], 4), (pair[1], 1)]).batches(10).state_dict()["weights"] == [0.8, 0.2]


@pytest.mark.parametrize("shuffle", ["full", "windowed", None])
def test_members_of_the_same_data_give_every_slot_once_in_the_order_of_one(pair, shuffle):
    options = {"seed": 3, "epochs": 2, "shuffle": shuffle, "window": 2, "last": "keep"}
    mixed = records(Mixture([(pair[0], 0.5), (pair[1], 0.5)]).batches(8, **options))
    alone = records(pair[0].batches(8, **options))
    assert [sorted((draw, slot) for _, draw, slot in batch) for batch in mixed] == [
        [(draw, slot) for _, draw, slot in batch] for batch in alone
    ]
    assert sorted(slot for batch in mixed[:7] for _, _, slot in batch) == list(range(50))


def test_records_come_from_the_store_they_say(pair):
    for batch in Mixture([(pair[0], 0.3), (pair[1], 0.7)]).batches(10, epochs=2):
        for number, store in enumerate(pair):
            here = batch.store == number
            stored = store.gather(batch.epoch, batch.slot[here])
            assert np.array_equal(batch.noise[here], stored["noise"].astype(np.float32))
            assert np.array_equal(batch.label[here], stored["label"])
            assert np.abs(batch.image[here] - (stored["image"] / 127.5 - 1)).max() < 1e-6


def test_members_of_other_data_go_through_their_own_epochs(strangers):
    mixture = Mixture([(strangers[0], 0.5), (strangers[1], 0.5)])
    flat = list(chain.from_iterable(records(mixture.batches(2, seed=1, epochs=3))))  # one of each
    assert len(flat) == 3 * (50 + 30)
    first = [(draw, slot) for store, draw, slot in flat if store == 0]
    second = [slot for store, _, slot in flat if store == 1]
    for seen, store in ((first, strangers[0]), ([(0, slot) for slot in second], strangers[1])):
        alone = [(batch.draw[0], batch.slot[0]) for batch in store.batches(1, seed=1, epochs=4)]
        assert seen == alone[: len(seen)]
    assert sorted(second[:30]) == sorted(second[30:60]) == list(range(30))


@QUICK
@given(
    same=st.booleans(),
    share=st.integers(1, 9),
    stopped=st.integers(0, 25),
    world=st.integers(1, 3),
    shuffle=st.sampled_from(["full", "windowed"]),
)
def test_a_mixture_resumes_at_any_world_size(pair, strangers, same, share, stopped, world, shuffle):
    members = list(zip(pair if same else strangers, (share / 10, 1 - share / 10)))
    options = {"seed": 1, "epochs": 2, "shuffle": shuffle, "window": 1, "last": "keep", "prefetch": False}
    whole = records(Mixture(members).batches(12, **options))
    first = Mixture(members).batches(12, **options)
    head = records(batch for _, batch in zip(range(stopped), first))
    ranks = [Mixture(members).batches(12, **options, rank=rank, world_size=world) for rank in range(world)]
    for reader in ranks:
        reader.load_state_dict(first.state_dict())
    parts = list(zip(*[records(reader) for reader in ranks], strict=True))
    assert head + [sorted(chain.from_iterable(part)) for part in parts] == [sorted(batch) for batch in whole]
    for part in parts[:1]:  # every rank gets its share of each member
        counts = [sum(store == 0 for store, _, _ in records) for records in part]
        assert max(counts) - min(counts) <= 1


def test_filters_hold_for_every_member(pair, strangers):
    for members in (pair, strangers):
        mixture = Mixture([(store, 1) for store in members])
        for batch in mixture.batches(4, filter=pc.field("label") == 3, epochs=2):
            assert (batch.label == 3).all()
    aligned = Mixture([(store, 1) for store in pair]).batches(5, filter=pc.field("label") == 3, shuffle=None)
    assert records(aligned) == [sorted(((n + 1) % 2, 0, slot) for n, slot in enumerate(range(3, 50, 10)))]


def test_a_state_of_another_mixture_is_refused(pair):
    state = Mixture([(pair[0], 0.8), (pair[1], 0.2)]).batches(10).state_dict()
    assert state["content_digest"] == [store.content_digest for store in pair]
    with pytest.raises(StateMismatch, match="weights"):
        Mixture([(pair[0], 0.7), (pair[1], 0.3)]).batches(10).load_state_dict(state)
    with pytest.raises(StateMismatch, match="content_digest"):
        Mixture([(pair[1], 0.8), (pair[0], 0.2)]).batches(10).load_state_dict(state)
    with pytest.raises(StateMismatch, match="content_digest"):
        pair[0].batches(10).load_state_dict(state)


def test_raw_needs_one_type(pair):
    assert next(Mixture([(pair[0], 1), (pair[0], 1)]).batches(10, raw=True)).noise.dtype == np.float16
    with pytest.raises(StorageError, match="float16, float32"):
        Mixture([(pair[0], 1), (pair[1], 1)]).batches(10, raw=True)


def test_stores_that_do_not_go_together_are_refused(make_store, small_spec):
    store = PairStore.open(make_store())
    for number, change in enumerate(({"fields": pair_fields((1, 2, 2))}, {"value_range": (0.0, 1.0)})):
        other = PairStore.open(make_store(2, replace(small_spec, **change), f"other{number}"))
        with pytest.raises(StorageError, match="differ"):
            Mixture([(store, 1), (other, 1)]).batches(10)


@pytest.mark.parametrize("wrong", [[1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1e9, 1]])
def test_weights_that_mean_nothing_are_refused(make_store, wrong):
    store = PairStore.open(make_store())
    with pytest.raises(ValueError, match=r"weights? (is|are) "):
        Mixture([(store, weight) for weight in wrong])
    with pytest.raises(ValueError, match="members is"):
        Mixture([])


def test_a_share_of_less_than_a_record_an_epoch_is_refused(pair):
    rows = pair[0].spec.rows
    assert len(records(Mixture([(pair[0], rows - 1), (pair[1], 1)]).batches(rows)))
    with pytest.raises(StorageError, match=f"less than one; the smallest share is 1/{rows}"):
        Mixture([(pair[0], rows), (pair[1], 1)]).batches(10)


def test_members_may_differ_in_codec_and_labels(make_store, small_spec):
    others = {
        "int8": replace(small_spec, codec="int8", fields=pair_fields((1, 4, 4), "int8")),
        "unlabelled": replace(small_spec, fields=pair_fields((1, 4, 4), label=False), classes=None),
    }
    stores = [PairStore.open(make_store())] + [PairStore.open(make_store(2, spec, n)) for n, spec in others.items()]
    for device in (None, "cpu"):
        for batch in Mixture([(store, 1) for store in stores]).batches(9, device=device):
            slot, member = np.asarray(batch.slot), np.asarray(batch.store)
            exact = stores[0].gather(0, slot)["noise"].astype(np.float32)
            error = np.abs(np.asarray(batch.noise) - exact).max(axis=(1, 2, 3))
            assert (error[member == 1] <= 0.0265).all()  # half a step, and float16's rounding
            assert (error[member != 1] == 0).all()
            assert np.array_equal(np.asarray(batch.label), np.where(member == 2, -1, slot % 10))


def test_odd_weights_of_many_members_still_deal_each_turn_once_far_into_the_stream(pair):
    weights = [0.31831, 0.22313, 0.14159, 0.11803, 0.10713, 0.09181]
    shares = Mixture([(pair[0], weight) for weight in weights]).weights
    assert sum(shares) == 1
    for start in (0, 10**11):
        store, turn = deal(np.arange(start, start + 20_000), shares)
        for member, weight in enumerate(weights):
            mine = turn[store == member]
            assert np.array_equal(np.diff(mine), np.ones(len(mine) - 1))
            assert abs(len(mine) / 20_000 - weight) < 1e-3
