"""A row field joins by source row, is added once and whole, and its files are plain npy."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from nfm.storage.errors import CorruptShard, MissingShard, NewerSchema, StorageError
from nfm.storage.files.atomic import read_json, write_json
from nfm.storage.files.copies.cache import ShardCache
from nfm.storage.ledger.row_fields import FIELD, RowField, row_field_names, write_row_field

VALUES = np.random.default_rng(0).normal(size=(50, 3, 2)).astype(np.float16)


def add(root: Path, values: np.ndarray = VALUES, name: str = "caption", **options) -> RowField:
    chunks = (values[start : start + 7] for start in range(0, len(values), 7))
    return write_row_field(root, name, chunks, values.shape[1:], values.dtype.name, **options)


@pytest.fixture
def root(make_store) -> Path:
    return make_store(draws=1)


@pytest.mark.parametrize("file_bytes", [1, 100, 1 << 20])
def test_any_rows_in_any_order_come_back_whatever_the_files(root, file_bytes):
    field = add(root, file_bytes=file_bytes)
    rows = np.random.default_rng(1).integers(0, 50, 80)
    np.testing.assert_array_equal(field.gather(rows), VALUES[rows])
    np.testing.assert_array_equal(RowField.open(root, "caption").gather([]), VALUES[:0])
    np.testing.assert_array_equal(np.concatenate(list(field.chunks(8))), VALUES)
    out = np.empty((2, 3, 2), np.float16)
    assert field.gather([49, 0], out) is out
    assert row_field_names(root) == ["caption"]
    assert len(field.files) == max(1, -(-50 // max(1, file_bytes // 12)))


def test_files_are_plain_npy_and_scalars_a_row_are_fields_too(root):
    add(root)
    field = add(root, np.arange(50), "year")
    assert field.shape == ()
    np.testing.assert_array_equal(np.load(next((root / "fields/caption").glob("*.npy")), allow_pickle=False), VALUES)
    assert row_field_names(root) == ["caption", "year"]
    assert field.gather([3, 49]).tolist() == [3, 49]


def test_too_few_or_too_many_rows_leave_nothing(root):
    for count, said in ((49, "49 rows were given, the source has 50"), (51, "more than 50 rows")):
        values = np.zeros((count, 2), np.float32)
        with pytest.raises(StorageError, match=said):
            add(root, values)
        assert not list((root / "fields/caption").glob("*"))
    with pytest.raises(StorageError, match="no field 'caption'"):
        RowField.open(root, "caption")


def test_names_shapes_and_dtypes_that_do_not_fit_are_refused(root):
    for name in ("Image", "../up", "", "a/b", "noise"):
        with pytest.raises(StorageError, match="name"):
            add(root, name=name)
    with pytest.raises(StorageError, match="dtype"):
        write_row_field(root, "caption", [np.array([object()])], (), "object")
    with pytest.raises(StorageError, match=r"a chunk is \[\[1, 2\]\]: it must be a numpy array"):
        write_row_field(root, "caption", [[[1, 2]]], (2,), "float16")
    with pytest.raises(StorageError, match="announced"):
        write_row_field(root, "caption", [VALUES.astype(np.float32)], (3, 2), "float16")


def test_a_field_never_changes_and_adding_it_again_is_no_error(root):
    first = add(root)
    again = add(root)
    assert again.files == first.files
    assert len(list((root / "fields/caption").iterdir())) == 2
    with pytest.raises(StorageError, match="other values"):
        add(root, VALUES + 1)
    np.testing.assert_array_equal(RowField.open(root, "caption").gather([5]), VALUES[[5]])
    assert len(list((root / "fields/caption").iterdir())) == 2


def test_a_row_outside_is_an_error(root):
    field = add(root)
    for rows in ([50], [-1, 3]):
        with pytest.raises(IndexError, match=r"outside 0\.\.49"):
            field.gather(rows)


def test_a_missing_or_cut_file_is_named(root):
    path = root / add(root).files[0].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptShard, match=path.name):
        RowField.open(root, "caption").gather([0])
    path.unlink()
    with pytest.raises(MissingShard, match=path.name):
        RowField.open(root, "caption").gather([0])


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 10**18, "rows_per_file": 1},
        {"rows_per_file": 0},
        {"shape": [-3, 2]},
        {"shape": [2**60, 2]},
        {"shape": "32"},
        {"dtype": "object"},
        {"dtype": "i4,i4"},
        {"name": "other"},
        {"files": []},
        {"files": [{"file": "../../spec.json", "rows": 50, "sha256": "ab" * 32, "bytes": 728}]},
        {"files": [{"file": "s00000.a.npy", "rows": 50, "sha256": "ab" * 32, "bytes": 729}]},
        {"files": 3},
    ],
)
def test_a_description_that_lies_is_refused(root, change):
    add(root)
    path = root / "fields/caption" / FIELD
    write_json(path, read_json(path) | change)
    with pytest.raises(StorageError, match=r"field"):
        RowField.open(root, "caption")


def test_a_newer_format_and_a_flipped_byte_are_refused(root):
    add(root)
    path = root / "fields/caption" / FIELD
    body = read_json(path)
    path.write_text(path.read_text().replace('"rows": 50', '"rows": 51'))
    with pytest.raises(StorageError, match="digest"):
        RowField.open(root, "caption")
    write_json(path, body | {"format": 2})
    with pytest.raises(NewerSchema, match="format 2"):
        RowField.open(root, "caption")
    assert json.loads(path.read_text())["format"] == 2


def test_a_field_of_a_url_is_fetched_and_checked(root, tmp_path):
    import fsspec

    add(root)
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/h4-fields/store", recursive=True)
    field = RowField.open("memory://h4-fields/store", "caption")
    np.testing.assert_array_equal(field.gather([4, 40, 4]), VALUES[[4, 40, 4]])
    assert row_field_names("memory://h4-fields/store") == ["caption"]


class Shared(ShardCache):
    """A cache whose folder another process empties once, between the arrival of a file and its opening."""

    emptied = False

    def opened(self, root, files, opener):
        def late(paths):
            if not self.emptied:
                self.emptied = True
                paths[0].unlink()
            return opener(paths)

        return super().opened(root, files, late)


def test_a_file_that_another_process_evicts_is_fetched_again(root, tmp_path):
    import fsspec

    add(root)
    fsspec.filesystem("memory").put(str(root), "/evicted-fields/store", recursive=True)
    cache = Shared(tmp_path / "shared")
    field = RowField.open("memory://evicted-fields/store", "caption", cache)
    np.testing.assert_array_equal(field.gather([4, 40, 4]), VALUES[[4, 40, 4]])
    assert cache.emptied


def test_rows_without_a_finite_value_are_told_with_their_number(root):
    """A row may lack a value, and NaN says so; a whole field of them is what a failed model left."""
    values = VALUES.astype(np.float32)
    values[3, 0, 0] = np.nan
    with warnings.catch_warnings(action="error"):
        add(root, values, "whole")
    values[[0, 49]] = np.nan, np.inf
    with pytest.warns(UserWarning, match="field 'caption': 2 of 50 rows have no finite value") as told:
        add(root, values)
    assert len(told) == 1
