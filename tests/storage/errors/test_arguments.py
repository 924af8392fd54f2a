"""Every argument of every public call has a rule. An error names the argument, its value and what is allowed."""

from __future__ import annotations

import inspect
import json
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest

import nfm.storage
from nfm.storage import BatchReader, ImageDataset, Mixture, PairStore, PairWriter, ShardCache, StorageError
from nfm.storage.errors.arguments import RULES, WrongArgument, checked, shown, whole
from nfm.storage.export import export
from nfm.storage.ledger.row_fields import RowField, write_row_field
from nfm.storage.reading.reader import ReadOptions
from nfm.storage.reading.torch_dataset import TorchBatches

# Made by the library alone, from what was checked already.
_MADE_HERE = {"PairStore.__init__", "ImageDataset.__init__", "RowField.__init__", "RowField.opened"}
_CHECKED_BY_THE_SPEC = {"PairWriter.write"}  # its arguments are the store's fields
_PUBLIC = [
    *(getattr(nfm.storage, name) for name in nfm.storage.__all__),
    RowField,
    TorchBatches,
    write_row_field,
    export,
]


def public_calls() -> Iterator[tuple[str, Callable[..., Any]]]:
    """(name, call) of every public function and method; errors and records that check their own fields are left out."""
    for item in _PUBLIC:
        if not inspect.isclass(item):
            yield item.__name__, item
        elif not issubclass(item, Exception) and not is_dataclass(item):
            for name, found in vars(item).items():
                call = found.__func__ if isinstance(found, classmethod | staticmethod) else found
                if inspect.isfunction(call) and (name == "__init__" or not name.startswith("_")):
                    yield f"{item.__name__}.{name}", call


def test_every_argument_of_every_public_call_has_a_rule() -> None:
    seen = 0
    for name, call in public_calls():
        parameters = [each for each in inspect.signature(call).parameters.values() if each.name not in ("self", "cls")]
        if not parameters or name in _MADE_HERE | _CHECKED_BY_THE_SPEC:
            continue
        rules = getattr(call, "checked", None)
        assert rules is not None, f"{name} takes arguments that nothing checks: decorate it with @checked()"
        expected = {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}
        if any(each.kind is each.VAR_KEYWORD for each in parameters):
            expected |= set(ReadOptions.__annotations__)
        assert set(rules) == expected, name
        seen += 1
    assert seen > 30


def test_a_new_argument_without_a_rule_is_an_error_where_the_call_is_defined() -> None:
    with pytest.raises(KeyError, match="colour"):

        @checked()
        def draw(colour: str) -> None: ...


_NO_NUMBER = ["3", True, None, 1.5, math.nan, math.inf, [3], -1, 2**70]
_WRONG: dict[str, list[Any]] = {
    "batch_size": [*_NO_NUMBER, 0, np.True_, np.array([1, 2])],
    "seed": [*_NO_NUMBER, "a"],
    "epochs": [each for each in _NO_NUMBER if each is not None],
    "window": [*_NO_NUMBER, 0],
    "rank": ["0", True, 0.5, -1],
    "world_size": ["1", True, 0, 1.5],
    "shuffle": ["Full", True, 1, ["full"]],
    "last": ["pad", None, True, ["drop"]],
    "filter": ["label == 3", {"label": 3}, 3, [], [("label", "==")], [3], True, [[]], object()],
    "fields": ["caption", None, 3, {"caption": 1}, [3], ["a", "a"]],
    "soften": [None, "0.5", True, math.nan, -0.1, 1, [0.5]],
    "prefetch": [None, 1, "yes"],
    "raw": [None, 0, "no"],
    "device": ["gpu", "cuda:x", True, 3.5, [], "meta"],
}


@pytest.mark.parametrize("name", _WRONG)
def test_a_wrong_argument_of_batches_is_told_by_its_name_value_and_what_is_allowed(make_store, name: str) -> None:
    store = PairStore.open(make_store(1))
    for source in (store, Mixture([(store, 1)])):
        for value in _WRONG[name]:
            with pytest.raises(WrongArgument) as told:
                source.batches(**{"batch_size": 10, name: value})
            assert str(told.value).startswith(name), (value, str(told.value))
            assert shown(value) in str(told.value), value
            assert isinstance(told.value, ValueError)


def test_each_kind_of_option_is_tried() -> None:
    options = set(ReadOptions.__annotations__) | {*inspect.signature(PairStore.batches).parameters}
    assert options - {"self", "options"} == set(_WRONG)


def test_numbers_are_taken_by_what_they_are(make_store) -> None:
    store = PairStore.open(make_store(1))
    plain = [batch.slot.tolist() for batch in store.batches(10, seed=3, epochs=2, window=2, shuffle="windowed")]
    for kind in (float, np.int32, np.uint8, np.float32, np.int64):
        how = {"seed": kind(3), "epochs": kind(2), "window": kind(2), "shuffle": "windowed"}
        reader = store.batches(kind(10), **how)
        assert [batch.slot.tolist() for batch in reader] == plain
        assert json.loads(json.dumps(reader.state_dict()))["seed"] == 3  # JSON's own numbers
    assert (store.gather(0.0, [1.0, 2.0])["slot"] == [1, 2]).all()
    with pytest.raises(WrongArgument, match=r"slots is .*whole numbers"):
        store.gather(0, [0.5])


def test_an_argument_that_nobody_knows_names_the_nearest(make_store) -> None:
    store = PairStore.open(make_store(1))
    for source in (store, Mixture([(store, 1)])):
        for call in (source.batches, source.as_torch_dataset):
            with pytest.raises(TypeError, match=r"no argument 'batchsize' \(did you mean 'batch_size'\?\)"):
                call(batchsize=3)
            with pytest.raises(TypeError, match=r"no argument 'field' \(did you mean 'fields'\?\)"):
                call(3, field=["a"])


def test_other_calls_tell_as_much(make_store, tmp_path: Path) -> None:
    store = PairStore.open(make_store(1))
    for call, said in (
        (lambda: PairStore.open(store.root, generation="1"), "generation is '1'"),
        (lambda: PairStore.open(3), "path is 3"),
        (lambda: PairStore.open(store.root, cache="/tmp"), "cache is '/tmp'"),
        (lambda: store.index("slot"), "columns is 'slot'"),
        (lambda: store.index(draw="0"), "draw is '0'"),
        (lambda: store.row_field(3), "name is 3"),
        (lambda: Mixture([store, store]), "members is"),
        (lambda: Mixture(store), "members is"),
        (lambda: Mixture([(store, "1")]), "a weight is '1'"),
        (lambda: Mixture([("store", 1)]), "member is 'store'"),
        (lambda: export(store, tmp_path / "x", "block"), r"layout is 'block'.*did you mean 'blocks'"),
        (lambda: export(store.root, tmp_path / "x"), "source is"),
        (lambda: PairWriter(tmp_path / "w", store.spec, draws=True), "draws is True"),
        (lambda: PairWriter(tmp_path / "w", {}), "spec is"),
        (lambda: ShardCache(max_bytes=0), "max_bytes is 0"),
        (lambda: ImageDataset.open(tmp_path, 3), "split is 3"),
        (lambda: write_row_field(store.root, "a", [], "4", "uint8"), "shape is '4'"),
        (lambda: store.batches(10).load_state_dict("state"), "state is 'state'"),
    ):
        with pytest.raises(WrongArgument, match=said):
            call()


def test_a_missing_device_gets_our_message_and_not_that_of_torch(make_store) -> None:
    torch = pytest.importorskip("torch")
    absent = [name for name, there in (("cuda", torch.cuda.is_available()), ("mps", False)) if not there]
    for name in [*absent, "cuda:97"]:
        with pytest.raises(WrongArgument, match=rf"device is '{name}', which torch cannot use here .*device='cpu'"):
            PairStore.open(make_store(1, name=name.replace(":", ""))).batches(10, device=name)


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_answers_anything_with_a_value_or_with_its_own_error(name: str) -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    plain = [None, True, 0, -1, 2**80, 1.5, math.nan, 1e300, 1j, "", "é", b"x", [], [[1], [1, 2]], {}, ["a", 1]]
    odd = [set(), object(), Rude(), type, np.array([1.5, np.inf]), np.datetime64("2020"), pc.field("a")]
    told = []
    for value in [*plain, *odd]:
        try:
            RULES[name](name, value)
        except WrongArgument as error:
            told.append(str(error))
    assert all(each.startswith(f"{name} is ") for each in told)


def test_the_error_travels_between_processes() -> None:
    error = WrongArgument("batch_size", "is 0", "pass last='keep'")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "batch_size is 0, or pass last='keep'"
    assert whole(1)("n", 4.0) == 4


def test_a_mixture_takes_shares_or_ratios_and_says_so_of_anything_else(make_store) -> None:
    store = PairStore.open(make_store(1))
    for weights in ((0.8, 0.1), (0.5, 0.6), (2.5, 1)):
        with pytest.raises(WrongArgument, match=r"their sum is .*shares sum to 1.*ratios"):
            Mixture([(store, weight) for weight in weights])
    for weights, shares in (((1 / 3,) * 3, [1 / 3] * 3), ((3, 1), [0.75, 0.25]), ((np.float32(0.5), 0.5), [0.5, 0.5])):
        mixture = Mixture([(store, weight) for weight in weights])
        assert [float(share) for share in mixture.weights] == pytest.approx(shares)


def test_stores_of_the_same_images_that_cannot_be_aligned_are_refused(make_store, small_spec) -> None:
    two, one = PairStore.open(make_store(2)), PairStore.open(make_store(1, name="one"))
    with pytest.raises(StorageError, match=r"1 draws of 50 rows.*2 draws of 50 rows.*every image once.*generation="):
        Mixture([(two, 0.5), (one, 0.5)])
    other = PairStore.open(make_store(1, replace(small_spec, source="cd" * 32), "other"))
    assert len(Mixture([(two, 0.5), (other, 0.5)]).stores) == 2


def test_a_reader_has_a_length_which_is_what_is_still_to_come(make_store) -> None:
    store = PairStore.open(make_store(2))
    for last, each in (("drop", 3), ("keep", 4)):
        reader = store.batches(15, epochs=2, last=last)
        for left in range(2 * each, 0, -1):
            assert len(reader) == left
            next(reader)
        assert len(reader) == 0
        assert bool(reader) is True
        with pytest.raises(StopIteration):
            next(reader)
    with pytest.raises(TypeError, match="no length"):
        len(store.batches(15, epochs=None))
    assert len(store.batches(15, epochs=0)) == 0


def test_a_length_is_counted_at_once_however_many_epochs_there_are(make_store) -> None:
    store = PairStore.open(make_store(3))
    some = ("draw", "==", 1), ("slot", "<", 31)  # of draw 1; of the others all
    chosen = {"filter": [some, [("draw", "!=", 1)]]}
    for how in ({}, chosen, {"last": "keep"}, {**chosen, "last": "keep"}):
        for epochs in (1, 2, 3, 7):
            reader = store.batches(15, epochs=epochs, **how)
            next(reader)
            torch = store.as_torch_dataset(15, epochs=epochs, **how)
            assert len(reader) + 1 == len(torch) == len(list(store.batches(15, epochs=epochs, **how)))
    assert len(store.batches(15, epochs=10**9)) == 3 * 10**9
    with pytest.raises(StorageError, match=r"epochs is .*or None \(without end\)"):
        store.batches(15, epochs=10**12)


def test_stores_and_readers_are_used_in_a_with(make_store) -> None:
    with PairStore.open(make_store(1)) as store:
        with store.batches(10) as reader:
            batch = next(reader)
        assert isinstance(reader, BatchReader)
    assert (batch.image == 0).mean() < 1  # what was yielded stays


def test_a_reader_says_how_to_read_in_another_process(make_store) -> None:
    store = PairStore.open(make_store(1))
    with pytest.raises(TypeError, match=r"cannot be pickled.*state_dict.*as_torch_dataset"):
        pickle.dumps(store.batches(10))
    assert len(pickle.loads(pickle.dumps(store))) == 50
