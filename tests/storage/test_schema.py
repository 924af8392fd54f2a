"""The recipe of a store reads back as written, tolerates foreign keys and refuses what it cannot mean."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nfm.storage import atomic
from nfm.storage.errors import NewerSchema, StorageError
from nfm.storage.schema import (
    FORMAT,
    Field,
    StoreSpec,
    pair_fields,
    parse_name,
    read_spec,
    shard_name,
    write_spec,
)


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
        ({"layout": "samples"}, "samples"),
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
    with pytest.raises(StorageError, match="role"):
        Field("image", "uint8", (1,), "picture")


def test_a_folder_that_is_no_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"spec\.json: no such file"):
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
