"""Stores of format 1, byte for byte in the repository, are read by this version; newer formats are refused by name."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from nfm.storage import ImageDataset, NewerSchema, PairStore
from nfm.storage.files import atomic
from nfm.storage.format import codecs
from nfm.storage.format.spec import read_spec
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.row_fields import RowField
from nfm.storage.verify import orphans, verify

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "store-format-1"
SUMS = FIXTURES / "SHA256SUMS"


def _load_make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nfm_fixture_make", FIXTURES / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _load_make()
STORES = [*make.STORES, "session-1"]


def sums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc"))
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != SUMS.name
    }


def listed() -> dict[str, str]:
    return {name: digest for digest, name in (line.split("  ", 1) for line in SUMS.read_text().splitlines())}


def test_every_file_is_byte_for_byte_what_was_committed() -> None:
    assert sums(FIXTURES) == listed()


@pytest.mark.parametrize("name", STORES)
def test_a_store_of_format_1_holds_the_values_of_its_formula(name: str) -> None:
    store = PairStore.open(FIXTURES / name)
    spec = store.spec
    assert (store.draws, len(store)) == (1 if name == "session-1" else make.DRAWS, make.ROWS)
    slots = np.arange(make.ROWS)
    for draw in range(store.draws):
        got, rows = store.gather(draw, slots), make.image_rows(spec, draw, slots)
        assert np.array_equal(got["image"], make.image(rows, spec.field("image").dtype))
        noise = codecs.unpack(got["noise"], spec.noise_step)
        np.testing.assert_allclose(noise, make.noise(draw, slots), rtol=1e-6)
        if spec.has("label"):
            assert np.array_equal(got["label"], make.label(rows))
        index = store.index(draw=draw)
        assert index["key"].to_pylist() == [f"d{draw:03d}-{slot:09d}" for slot in slots]
        assert index["row"].to_pylist() == rows.tolist()
        assert index["flip"].to_pylist() == (slots % 2 == 1).tolist()
        assert index["nll"].to_pylist() == (slots / 8).tolist()
    batches = list(store.batches(4, seed=3, epochs=store.draws, last="keep"))
    assert sorted(slot for batch in batches for slot in batch.slot) == sorted(slots.tolist() * store.draws)


@pytest.mark.parametrize("name", STORES)
def test_a_store_of_format_1_verifies_at_the_deep_level(name: str) -> None:
    assert verify(FIXTURES / name, level="deep") == []


def test_the_older_generation_of_a_fixture_is_read_too() -> None:
    for name in make.STORES:
        assert seal.numbers(FIXTURES / name) == [1, 2]
        assert PairStore.open(FIXTURES / name, generation=1).draws == 1


@pytest.mark.parametrize("name", ["blocks", "samples"])
def test_a_row_scoped_field_of_format_1_is_read(name: str) -> None:
    rows = np.arange(make.ROWS)
    assert np.array_equal(RowField.open(FIXTURES / name, "caption").gather(rows), make.caption(rows))
    (batch,) = PairStore.open(FIXTURES / name).batches(make.ROWS, fields=("caption",))
    expected = make.caption(make.image_rows(read_spec(FIXTURES / name), 0, batch.slot))
    assert np.array_equal(batch.fields["caption"], expected)


def test_a_dataset_of_format_1_is_read() -> None:
    for split, first, rows in (("train", 0, 8), ("heldout", 8, 7)):
        data = ImageDataset.open(FIXTURES / "dataset", split)
        slots = np.arange(first, first + rows)
        assert np.array_equal(data.images(np.arange(rows)), make.image(slots))
        assert np.array_equal(data.labels(np.arange(rows)), make.label(slots))
        assert data.keys(np.arange(rows)) == [f"image-{slot}" for slot in slots]


def test_this_version_writes_the_same_bytes(tmp_path: Path) -> None:
    """All but the index parts, whose bytes are Parquet's, and what hashes them."""
    make.main(tmp_path)
    old, new = listed(), sums(tmp_path)
    assert set(new) == {name for name in old if not name.startswith("session-1")}
    parquet = ("commits/", "manifest.", ".parquet")
    assert {name for name in new if new[name] != old[name]} <= {n for n in new if any(part in n for part in parquet)}
    for name in make.STORES:
        here, there = (PairStore.open(folder / name) for folder in (tmp_path, FIXTURES))
        assert (here.content_digest, here.order_key) == (there.content_digest, there.order_key)


def test_a_reader_that_the_first_session_stopped_goes_on_with_the_same_batches() -> None:
    saved = json.loads((FIXTURES / "session-1.state.json").read_text())
    reader = PairStore.open(FIXTURES / "session-1").batches(3, seed=5, epochs=2, last="keep")
    reader.load_state_dict(saved["state"])
    assert [[batch.epoch, batch.slot.tolist()] for batch in reader] == saved["rest"]


def test_a_store_that_the_first_session_left_half_made_is_finished(tmp_path: Path) -> None:
    root = tmp_path / "store"
    shutil.copytree(FIXTURES / "session-1", root)
    assert orphans(root) == ["index/d001-s00001.killed.parquet", "shards/d001-s00001.killed.tar"]
    spec, before = read_spec(root), sums(root)
    assert spec == make_again(spec)
    assert set(commits.committed(root, 2)) == {"d000-s00000", "d000-s00001", "d001-s00000"}
    make.write(root, spec, 1, 1)
    seal.seal(root, 2)
    assert verify(root, level="deep") == []
    assert before.items() <= sums(root).items()
    slots = np.arange(make.ROWS)
    np.testing.assert_array_equal(PairStore.open(root).gather(1, slots)["noise"], make.noise(1, slots))
    assert PairStore.open(root).content_digest == PairStore.open(FIXTURES / "blocks").content_digest


def make_again(spec: Any) -> Any:
    return type(spec).from_dict(json.loads(json.dumps(spec.to_dict())))


def _in_spec(body: dict[str, Any]) -> None:
    body["store"]["format"] = 2


def _in_body(body: dict[str, Any]) -> None:
    body["format"] = 2


@pytest.mark.parametrize(
    ("file", "change", "read"),
    [
        ("blocks/spec.json", _in_spec, lambda root: PairStore.open(root / "blocks")),
        ("blocks/manifest.g0002.json", _in_body, lambda root: PairStore.open(root / "blocks")),
        ("blocks/commits/d000-s00001.json", _in_body, lambda root: commits.read(root / "blocks", "d000-s00001")),
        ("blocks/fields/caption/field.json", _in_body, lambda root: RowField.open(root / "blocks", "caption")),
        ("dataset/dataset.json", _in_body, lambda root: ImageDataset.open(root / "dataset")),
    ],
)
def test_a_newer_format_is_refused_and_named(
    tmp_path: Path, file: str, change: Callable[[dict[str, Any]], None], read: Callable[[Path], Any]
) -> None:
    for name in ("blocks", "dataset"):
        shutil.copytree(FIXTURES / name, tmp_path / name)
    body = atomic.read_json(tmp_path / file)
    change(body)
    atomic.write_json(tmp_path / file, body)
    with pytest.raises(NewerSchema, match=r"format 2.*install a newer") as told:
        read(tmp_path)
    assert file.split("/")[-1] in str(told.value)
    if file.startswith("blocks"):
        assert any("format 2" in finding.problem for finding in verify(tmp_path / "blocks"))
