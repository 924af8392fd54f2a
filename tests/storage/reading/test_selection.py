"""Filters: the records that match, each once an epoch, in an order that belongs to the state."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nfm.storage import MissingShard, PairStore, PairWriter, StateMismatch, StorageError, StoreSpec
from nfm.storage.errors.arguments import WrongArgument
from nfm.storage.format.fields import pair_fields

ODD = pc.field("flip")
QUICK = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def slots(reader) -> list[int]:
    return list(chain.from_iterable(batch.slot.tolist() for batch in reader))


@pytest.fixture
def store(make_store):
    return PairStore.open(make_store())


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        (pc.field("label") == 3, [3, 13, 23, 33, 43]),
        ([("label", "==", 3)], [3, 13, 23, 33, 43]),
        ([("label", "in", [3, 4]), ("slot", "<", 20)], [3, 4, 13, 14]),
        ([("label", "in", {3, np.int32(4)}), ("slot", "<", 20)], [3, 4, 13, 14]),
        ([["key", "in", ("d000-000000009",)]], [9]),
        ([[("slot", "==", 7)], [("slot", "==", 41)]], [7, 41]),
        ((pc.field("slot") >= 18) & (pc.field("slot") < 22), [18, 19, 20, 21]),
        (pc.field("key") == "d000-000000009", [9]),
        (pc.field("nll") <= 0.5, list(range(50))),
    ],
)
@pytest.mark.parametrize("shuffle", ["full", "windowed", None])
def test_an_epoch_holds_the_records_that_match(store, filter, expected, shuffle):
    batches = list(store.batches(4, filter=filter, shuffle=shuffle, last="keep", window=1))
    assert sorted(chain.from_iterable(batch.slot.tolist() for batch in batches)) == expected
    for batch in batches:
        stored = store.gather(0, batch.slot)
        assert np.array_equal(batch.noise, stored["noise"].astype(np.float32))
        assert np.array_equal(batch.label, stored["label"])


@QUICK
@given(
    chosen=st.sets(st.integers(0, 49), min_size=1),
    batch=st.integers(1, 12),
    shuffle=st.sampled_from(["full", "windowed", None]),
    stopped=st.integers(0, 60),
    world=st.integers(1, 3),
)
def test_filtered_reading_resumes_at_any_world_size(store, chosen, batch, shuffle, stopped, world):
    options = {"filter": pc.field("slot").isin(sorted(chosen)), "shuffle": shuffle, "last": "keep"}
    options |= {"window": 1, "epochs": 3, "prefetch": False, "seed": 5}
    whole = [b.slot.tolist() for b in store.batches(batch * 6, **options)]
    for epoch in range(3):
        each = len(whole) // 3
        assert sorted(chain.from_iterable(whole[epoch * each : (epoch + 1) * each])) == sorted(chosen)
    first = store.batches(batch * 6, **options)
    head = [b.slot.tolist() for _, b in zip(range(stopped), first)]
    ranks = [store.batches(batch * 6, **options, rank=rank, world_size=world) for rank in range(world)]
    for reader in ranks:
        reader.load_state_dict(first.state_dict())
    tail = [list(chain.from_iterable(parts)) for parts in zip(*[[b.slot.tolist() for b in r] for r in ranks])]
    assert head + tail == whole


def test_epochs_take_turns_over_the_draws_that_match(store):
    reader = store.batches(5, epochs=3, filter=(pc.field("draw") == 1) & (pc.field("slot") < 10))
    met = [(batch.epoch, batch.draw.tolist(), batch.slot.tolist()) for batch in reader]
    assert [(epoch, set(draws)) for epoch, draws, _ in met] == [(e, {1}) for e in (0, 0, 1, 1, 2, 2)]
    assert sorted(met[0][2] + met[1][2]) == list(range(10))


def test_draws_may_differ_in_what_matches(store):
    filter = ((pc.field("draw") == 0) & (pc.field("slot") < 3)) | ((pc.field("draw") == 1) & (pc.field("slot") < 7))
    seen: dict[int, list[int]] = {}
    for batch in store.batches(2, epochs=4, filter=filter, last="keep"):
        seen.setdefault(batch.epoch, []).extend(batch.slot.tolist())
    assert [sorted(seen[epoch]) for epoch in range(4)] == [list(range(3)), list(range(7))] * 2
    with pytest.raises(ValueError, match="exceeds the 3 records"):
        store.batches(4, filter=filter)


def test_stores_of_the_same_data_are_filtered_to_the_same_order(make_store, small_spec, store):
    spec = replace(small_spec, coupling="nfm", codec="float32", fields=pair_fields((1, 4, 4), "float32"))
    other = PairStore.open(make_store(2, spec, "other"))
    orders = [slots(s.batches(5, seed=2, filter=[("label", "<", 4)])) for s in (store, other)]
    assert orders[0] == orders[1]
    assert orders[0] != slots(store.batches(5, seed=3, filter=[("label", "<", 4)]))


def test_the_filter_is_part_of_the_state(store):
    state = store.batches(2, filter=pc.field("label") == 3).state_dict()
    assert state["filter"] == "(label == 3)"
    store.batches(2, filter=[("label", "==", 3)]).load_state_dict(state)
    for other in (pc.field("label") == 4, None):
        with pytest.raises(StateMismatch, match=r"order_key|filter"):
            store.batches(2, filter=other).load_state_dict(state)


def test_long_lists_that_print_alike_are_told_apart(store):
    long, other = list(range(50)), [*range(20), 21, *range(21, 50)]
    one = store.batches(2, filter=pc.field("slot").isin(long))
    two = store.batches(2, filter=pc.field("slot").isin(other))
    assert one.state_dict()["filter"] == two.state_dict()["filter"]
    with pytest.raises(StateMismatch, match="order_key"):
        two.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        (pc.field("lable") == 3, r"lable.*key \(string\), slot \(int64\).*nll \(float\)"),
        ([("lable", "==", 3)], r"no column 'lable' \(did you mean 'label'\?\)"),
        ([("colour", "==", 3)], "colour.*label"),
        (
            pc.field("label") == "cat",
            r"\(label == \"cat\"\): its values do not fit its columns, label is int64 \(pyarrow",
        ),
        ([("label", "in", ["a"]), ("key", ">", 3)], "label is int64"),
        ([("label", "in", "10")], r"a list of values of the column, label is int64"),
        ([[("label", "not in", ["1"])], [("slot", "==", 1)]], "a list of values of the column"),
        ([["label", "in", [True]]], "a list of values of the column"),
        ([("key", "in", "abc")], "key is string"),
        ([("label", "in", [])], "a list of values of the column, label is int64"),
        ([("nll", "<", float("nan"))], "nothing compares with this one"),
        ([("label", "==", None)], "nothing compares with this one"),
        (pc.field("label"), r"gives a value \(int64\) where true or false is needed: compare it"),
        (pc.field("label", "name") == 1, "names a column that is not there; the index has the columns key"),
        ([("label", "==", 2**70)], "pyarrow expression"),
        ("label == 3", "pyarrow expression"),
        ([("label", "~", 3)], "pyarrow expression"),
    ],
)
def test_a_filter_that_means_nothing_is_refused_before_anything_is_read(make_store, filter, message):
    root = make_store()
    for part in (root / "index").iterdir():
        part.unlink()
    with pytest.raises(ValueError, match=message):
        PairStore.open(root).batches(2, filter=filter)


@pytest.mark.parametrize(
    "filter", [pc.field("slot") / pc.field("draw") == 1, pc.match_substring_regex(pc.field("key"), "(")]
)
def test_a_filter_that_cannot_be_computed_is_named(store, filter):
    with pytest.raises(WrongArgument, match=r"filter .*(slot|key).*: it cannot be computed for every record \("):
        store.batches(2, filter=filter)


@pytest.mark.parametrize("filter", [pc.field("nll") < 3, ~(pc.field("nll") < 3), [("label", "==", 1), ("nll", ">", 0)]])
def test_a_filter_on_nll_where_no_record_has_one_is_refused(tmp_path, filter):
    spec = StoreSpec.external(rows=6, image_shape=(1, 2, 2), classes=2, origin="a test")
    with PairWriter(tmp_path, spec) as writer:
        writer.write(image=np.zeros((6, 1, 2, 2), np.uint8), noise=np.zeros((6, 1, 2, 2)), label=np.arange(6) % 2)
    with pytest.raises(WrongArgument, match=r"no record of .* has an nll"):
        PairStore.open(tmp_path).batches(2, filter=filter)


def test_a_filter_that_nothing_matches_says_so(store):
    with pytest.raises(StorageError, match=r"no record matches the filter \(label == 77\)"):
        store.batches(2, filter=pc.field("label") == 77)


def test_a_missing_index_part_is_named(make_store):
    root = make_store()
    part = next((root / "index").glob("d001-s00001*"))
    part.unlink()
    with pytest.raises(MissingShard, match=part.name):
        PairStore.open(root).batches(2, filter=pc.field("label") == 3)
