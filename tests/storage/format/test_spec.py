"""The recipe of a store reads back as written, ignores unknown keys, and refuses invalid values."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfm.storage import PairStore, PairWriter
from nfm.storage.errors import NewerSchema, StorageError
from nfm.storage.files import atomic
from nfm.storage.format.fields import Field, pair_fields
from nfm.storage.format.spec import FORMAT, StoreSpec, parse_name, read_spec, shard_name, write_spec


def test_a_spec_reads_back_from_json_with_foreign_keys_around_it(tmp_path: Path, small_spec: StoreSpec) -> None:
    recipe = small_spec.to_dict() | {"added_later": 1}
    atomic.write_json(tmp_path / "spec.json", {"stage": "pairs", "config": {"draws": 2}, "store": recipe})
    assert read_spec(tmp_path) == small_spec
    assert StoreSpec.from_dict(recipe) == small_spec


def test_slots_of_the_shards_cover_every_row_once(small_spec: StoreSpec) -> None:
    slots = [slot for shard in range(small_spec.shards_per_draw) for slot in small_spec.slots_of(shard)]
    assert slots == list(range(small_spec.rows))
    with pytest.raises(StorageError, match="shards 0 to 2"):
        small_spec.slots_of(3)


def test_a_newer_schema_is_refused_with_the_file_and_the_remedy(tmp_path: Path, small_spec: StoreSpec) -> None:
    recipe = small_spec.to_dict() | {"format": FORMAT + 1, "fields": "of a kind unknown today"}
    atomic.write_json(tmp_path / "spec.json", {"store": recipe})
    with pytest.raises(NewerSchema, match=r"spec\.json.*format 2.*install a newer"):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": 0}, "rows = 0"),
        ({"codec": "float32"}, "noise field is float16"),
        ({"codec": "int3"}, "int3"),
        ({"layout": "columns"}, "columns"),
        ({"layout": "zarr", "rows_per_block": 8}, r"rows_per_shard 20 is no multiple of rows_per_block 8; use 24"),
        ({"codec": "pcodec"}, "pcodec"),
        ({"noise_step": 0.05}, "noise_step 0.05 with codec float16"),
        ({"image_scale": 0.18}, "for float images only"),
        ({"fields": pair_fields((1, 4, 4), image_dtype="int64")}, "int64"),
        ({"rows": 10**7, "rows_per_shard": 1}, "raise rows_per_shard"),
        ({"value_range": (1.0, -1.0)}, "lowest"),
        ({"layout": "zarr", "rows_per_shard": 10**8, "rows_per_block": 1}, "raise rows_per_block"),
        ({"fields": pair_fields((1, 4, 4))[:1]}, "no field 'noise'"),
        ({"fields": pair_fields((1, 4, 4)) * 2}, "twice"),
    ],
)
def test_a_recipe_that_makes_no_sense_says_why(small_spec: StoreSpec, change: dict, said: str) -> None:
    with pytest.raises(StorageError, match=said):
        dataclasses.replace(small_spec, **change)


def test_fields_hold_numbers_only() -> None:
    for dtype in ("object", "U8", "nonsense"):
        with pytest.raises(StorageError, match=dtype):
            Field("image", dtype, (1,), "image")
    for numpys in (np.float32, np.dtype("f4"), "float32"):
        assert Field("image", numpys, (1,), "image").dtype == "float32"
    with pytest.raises(StorageError, match="role"):
        Field("image", "uint8", (1,), "picture")


def test_a_recipe_of_before_reads_as_one_with_the_defaults(tmp_path: Path, small_spec: StoreSpec) -> None:
    recipe = small_spec.to_dict()
    assert not {"noise_step", "image_scale", "image_decoder"} & set(recipe)  # so a store's old recipe is its recipe
    atomic.write_json(tmp_path / "spec.json", {"store": recipe})
    assert read_spec(tmp_path) == small_spec
    assert read_spec(tmp_path).to_dict() == recipe


def test_a_step_is_that_of_the_codec_unless_it_is_given() -> None:
    fields = pair_fields((4, 8, 8), "int8", "float16", label=False)
    facts = {"rows": 4, "rows_per_shard": 4, "coupling": "nfm", "source": "s", "codec": "int8"}
    spec = StoreSpec(fields=fields, image_scale=0.18215, image_decoder="some/vae", **facts)
    assert spec.noise_step == 1 / 20
    assert [field.name for field in spec.fields] == ["image", "noise", "slot"]
    assert StoreSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert StoreSpec(fields=fields, noise_step=0.1, **facts).noise_step == 0.1


HOSTILE = [None, True, -1, 0, 1.5, 2**70, 10**400, 1e308, "", "x", "\x00", "../..", [], {}, [[]], [{}], {"a": 1}]


@pytest.mark.parametrize("value", [*HOSTILE, float("nan"), float("inf"), "x" * 10**6, [2**31] * 5, [[1] * 9] * 9])
def test_a_hostile_recipe_is_a_storage_error_and_nothing_else(small_spec: StoreSpec, value: Any) -> None:
    recipe = small_spec.to_dict()
    for key in recipe:
        _reads_or_is_refused(recipe | {key: value})
        _reads_or_is_refused({k: v for k, v in recipe.items() if k != key})
    for key in ("name", "dtype", "shape", "role"):
        for number in range(4):
            fields = [dict(field) for field in recipe["fields"]]
            fields[number][key] = value
            _reads_or_is_refused(recipe | {"fields": fields})
            del fields[number][key]
            _reads_or_is_refused(recipe | {"fields": fields})


def _reads_or_is_refused(recipe: dict[str, Any]) -> None:
    try:
        spec = StoreSpec.from_dict(recipe)
    except StorageError:
        return
    assert 1 <= spec.rows <= 10**9
    assert 1 <= spec.shards_per_draw <= 100_000
    assert sum(field.bytes_per_record for field in spec.fields) <= 2**28


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_shape": (8, 8)}, r"image_shape 8x8: give \(channels, height, width\)"),
        ({"image_shape": (1, 1, 8, 8)}, "channels, height, width"),
        ({"image_shape": 8}, "image_shape"),
        ({"image_shape": (1, 0, 8)}, r"field 'image': a size of its shape = 0, it must be a whole number from 1"),
        ({"image_dtype": "f4"}, "field 'image': dtype 'f4' is none of bool, int8"),
        ({"image_dtype": object}, "dtype 'object' is none of"),
        ({"classes": 0}, "classes 0: leave classes out"),
        ({"eta": -1.0}, "eta -1.0: give 0 or more"),
        ({"sigma_f": -0.5}, "sigma_f -0.5: give 0 or more"),
    ],
)
def test_a_recipe_of_external_pairs_that_nobody_could_train_on_is_refused(change: dict, said: str) -> None:
    with pytest.raises(StorageError, match=said):
        StoreSpec.external(**{"rows": 10, "image_shape": (1, 8, 8), "origin": "a test", **change})


def test_a_file_where_a_store_should_be_is_told_to_readers_and_writers(tmp_path: Path, small_spec: StoreSpec) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("no store", encoding="utf-8")
    with pytest.raises(StorageError, match=r"notes\.txt: a file that is no manifest of a store; name the folder"):
        PairStore.open(file)
    with pytest.raises(StorageError, match=r"notes\.txt: a file, and a store is a folder; write to a new or empty"):
        PairWriter(file, small_spec)
    assert file.read_text(encoding="utf-8") == "no store"


def test_a_folder_that_is_no_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no pair store, it has no spec\.json"):
        read_spec(tmp_path)
    atomic.write_json(tmp_path / "spec.json", {"stage": "teacher"})
    with pytest.raises(StorageError, match=r"spec\.json.*is it a pair store"):
        read_spec(tmp_path)


def test_a_store_keeps_its_recipe(tmp_path: Path, small_spec: StoreSpec) -> None:
    write_spec(tmp_path, small_spec)
    write_spec(tmp_path, small_spec)
    with pytest.raises(StorageError, match="another recipe"):
        write_spec(tmp_path, dataclasses.replace(small_spec, seed=1))


def test_shard_names_have_a_fixed_width_and_parse_back() -> None:
    assert shard_name(0, 12) == "d000-s00012"
    assert parse_name("d007-s12345") == (7, 12345)
    for wrong in ((1000, 0), (0, 100_000), (-1, 0)):
        with pytest.raises(StorageError):
            shard_name(*wrong)
    with pytest.raises(StorageError):
        parse_name("d7-s1")
