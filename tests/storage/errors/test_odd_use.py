"""What is closed, filled, missing or continued in a way that cannot be is refused, and the message says what can."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from nfm.storage import DatasetWriter, Mixture, PairStore, PairWriter, StateMismatch, StorageError, StoreSpec
from nfm.storage.errors import NoPlace
from nfm.storage.errors.arguments import WrongArgument
from nfm.storage.ledger.row_fields import write_row_field


def test_what_is_closed_says_so_and_how_to_go_on(make_store, tmp_path: Path) -> None:
    store = PairStore.open(make_store(1))
    reader = store.batches(10)
    next(reader)
    reader.close()
    for use in (lambda: next(reader), lambda: reader.load_state_dict(reader.state_dict())):
        with pytest.raises(StorageError, match=r"reader is closed: make another one with `batches`.*state_dict"):
            use()
    rest = store.batches(10)
    rest.load_state_dict(reader.state_dict())
    assert len(list(rest)) == 4
    going = store.batches(10)
    next(going)
    field = write_row_field(store.root, "more", [np.zeros((50, 2), np.int64)], (2,), "int64")
    assert field.rows == 50
    store.close()
    for read in (
        lambda: store.batches(10), lambda: store.as_torch_dataset(10), lambda: store.gather(0, [1]),
        store.index, lambda: store.image_rows(0, [1]), lambda: store.row_field("more"), lambda: store.shard(0, 0),
        lambda: list(going), lambda: Mixture([(store, 1)]).batches(10),
    ):  # fmt: skip
        with pytest.raises(StorageError, match=r"store is closed; open it again with `PairStore\.open`"):
            read()
    assert (len(store), store.draws, len(pickle.loads(pickle.dumps(store)).gather(0, [1])["slot"])) == (50, 1, 1)

    writer = DatasetWriter(tmp_path / "images", "toy", (1, 2, 2), ["a"])
    chunk = (np.zeros((3, 1, 2, 2), np.uint8), np.zeros(3, np.int64), ["x", "y", "z"])
    writer.write_split("train", 3, [chunk])
    with pytest.raises(StorageError, match="'train' is written already"):
        writer.write_split("train", 3, [chunk])
    writer.close()
    for use in (writer.close, lambda: writer.write_split("heldout", 3, [chunk])):
        with pytest.raises(StorageError, match="writer is closed"):
            use()


def test_unknown_columns_and_wrong_arrays_to_fill_are_refused_by_name(make_store) -> None:
    store, slots = PairStore.open(make_store(1)), np.arange(4)
    with pytest.raises(
        WrongArgument, match=r"columns has 'lable' \(did you mean 'label'\?\); there are key, slot, row"
    ):
        store.index(["slot", "lable"])
    shape, locked = (4, 1, 4, 4), np.empty((4, 1, 4, 4), np.float32)
    locked.flags.writeable = False
    for out, said in (
        ({"pixels": locked}, r"out has 'pixels'; there are image, noise, label, slot"),
        ([locked], r"out is \[array.*must be a dict"),
        (
            {"image": locked.tolist()},
            r"out\['image'\] is a list: it must be a contiguous, writable numpy array of uint8 or",
        ),
        ({"image": torch.zeros(shape)}, r"out\['image'\] is a Tensor"),
        ({"image": np.empty(shape, np.int16)}, r"out\['image'\] is int16 4x1x4x4: .*uint8 or float32 4x1x4x4"),
        ({"noise": np.empty((3, 1, 4, 4), np.float16)}, r"out\['noise'\] is float16 3x1x4x4"),
        ({"image": np.empty((4, 1, 4, 8), np.uint8)[..., ::2]}, r"out\['image'\] is not contiguous"),
        ({"noise": locked}, r"out\['noise'\] is read-only"),
        ({"label": np.empty((4,), np.float32)}, r"out\['label'\] is float32 4: .*int64 4"),
    ):
        with pytest.raises(WrongArgument, match=said):
            store.gather(0, slots, out)
    with pytest.raises(WrongArgument, match="int16 0x1x4x4"):  # also where nothing is to be read
        store.gather(0, slots[:0], {"image": np.empty((0, 1, 4, 4), np.int16)})
    field = write_row_field(store.root, "more", [np.zeros((50, 2), np.int64)], (2,), "int64")
    with pytest.raises(WrongArgument, match=r"out is float32 4x2: it must be .* int64 4x2"):
        field.gather(slots, np.empty((4, 2), np.float32))


def test_a_call_names_itself_where_an_argument_is_missing(make_store) -> None:
    with pytest.raises(TypeError, match=r"PairStore\.gather: missing a required argument: 'slots'"):
        PairStore.open(make_store(1)).gather(0)
    with pytest.raises(TypeError, match=r"PairWriter: missing a required argument: 'spec'"):
        PairWriter("here")


def test_an_external_recipe_names_what_it_takes() -> None:
    plain = {"rows": 4, "image_shape": (1, 2, 2), "origin": "a test"}
    for name in ("coupling", "fields", "colour"):
        said = rf"external has no argument '{name}'.*; it takes rows, image_shape, .*source, noise_step, .*teacher"
        with pytest.raises(TypeError, match=said):
            StoreSpec.external(**plain, **{name: "x"})
    assert StoreSpec.external(**plain, seed=3).seed == 3


def test_a_state_that_cannot_be_is_refused(make_store) -> None:
    store = PairStore.open(make_store(1))
    state = store.batches(10).state_dict()
    for change, error, said in (
        ({"epoch": 1}, StateMismatch, r"epoch is 1 there, and this reader has epochs 0 to 0: read with epochs=2"),
        ({"epoch": 10**6}, StateMismatch, "epochs=1000001"),
        ({"epoch": 10**12}, WrongArgument, "0 to 1000000000"),
        ({"epoch": -1}, WrongArgument, "state"),
        ({"consumed": 51}, StateMismatch, "epoch 0 has 50 records"),
        ({"consumed": "5"}, WrongArgument, "whole number"),
        ({"soften": "much"}, StateMismatch, "soften is much there and 0.0 here"),
        ({"soften": None}, StateMismatch, "soften is None there"),
    ):
        with pytest.raises(error, match=said):
            store.batches(10).load_state_dict(state | change)
    reader = store.batches(10, epochs=None)
    reader.load_state_dict(state | {"epoch": 7})
    assert next(reader).epoch == 7


def test_a_loaders_state_that_cannot_be_is_refused(make_store) -> None:
    dataset = PairStore.open(make_store(1)).as_torch_dataset(10)
    state = dataset.state_dict()
    dataset.load_state_dict(state | {"turn": [1, 2]})
    for change in (
        {"turn": "x"}, {"turn": [2, 2]}, {"turn": [0]}, {"first_epoch": "x"}, {"first_epoch": -1}, {"first_epoch": 1},
        {"finished": "yes"}, {"epoch": 10**12},
    ):  # fmt: skip
        with pytest.raises(WrongArgument, match=rf"state\['{next(iter(change))}'\] is "):
            dataset.load_state_dict(state | change)


def test_what_is_opened_is_a_store_or_a_manifest_of_one(make_store, tmp_path: Path) -> None:
    root = make_store(1)
    (tmp_path / "plain").mkdir()
    for place, said in (
        (tmp_path / "plain", "no pair store, it has no spec.json; name the folder of one"),
        (tmp_path / "none", "no such folder"),
        (root / "spec.json", "a file that is no manifest of a store; name the folder of the store"),
        (next(root.glob("commits/*")), "a file that is no manifest of a store"),
    ):
        with pytest.raises(NoPlace, match=said):
            PairStore.open(place)
    assert PairStore.open(root / "manifest.g0001.json").generation == 1
