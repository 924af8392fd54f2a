"""Reads and checks dataset.json. It may name only files of its own splits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nfm.storage.errors import StorageError
from nfm.storage.files.atomic import read_json
from nfm.storage.format import untrusted
from nfm.storage.format.fields import IMAGE_DTYPES, Field
from nfm.storage.format.spec import check_format

DATASET = "dataset.json"
SPLIT_NAME = r"[A-Za-z0-9_-]+"
_MOST_ROWS = 10**9
_MOST_CLASSES = 10**6


def read_record(root: Path) -> dict[str, Any]:
    """The contents of the dataset.json at `root`.

    Raises StorageError if the file is not valid or contradicts itself, NewerSchema if a newer version wrote it.
    """
    path = root / DATASET
    return check_record(path, read_json(path))


def check_record(path: Path, body: dict[str, Any]) -> dict[str, Any]:
    """Checks what `path` holds or will hold. Reader and writer share the rule, so every written file can be opened."""
    check_format(path, body)
    needed = {"name", "image_shape", "value_range", "classes", "rows_per_block", "splits"}
    if lacking := needed - set(body):
        raise StorageError(
            f"{path}: no dataset of the data stage, it lacks {', '.join(sorted(lacking))}; run `nfm run data` again"
        )
    untrusted.text(f"{path}: name", body["name"])
    untrusted.one_of(f"{path}: dtype", body.get("dtype", "uint8"), IMAGE_DTYPES)
    Field("image", body.get("dtype", "uint8"), body["image_shape"], "image")  # raises for an invalid shape
    ends = [
        untrusted.real(f"{path}: value_range", end)
        for end in untrusted.sequence(f"{path}: value_range", body["value_range"], 2)
    ]
    if len(ends) != 2 or not -1e6 <= ends[0] < ends[1] <= 1e6:
        raise StorageError(
            f"{path}: value_range {ends} is not the lowest and the highest value; restore it from a copy"
        )
    for name in untrusted.sequence(f"{path}: classes", body["classes"], _MOST_CLASSES):
        untrusted.text(f"{path}: classes", name)
    untrusted.integer(f"{path}: rows_per_block", body["rows_per_block"], 1, _MOST_ROWS)
    for name in ("image_scale", "image_shift"):
        if body.get(name) is not None:
            untrusted.real(f"{path}: {name}", body[name])
    if body.get("image_decoder") is not None:
        untrusted.text(f"{path}: image_decoder", body["image_decoder"])
    for split, part in untrusted.mapping(f"{path}: splits", body["splits"]).items():
        _check_split(path, split, untrusted.mapping(f"{path}: split {untrusted.shown(split)}", part))
    return body


def _check_split(path: Path, split: str, part: Mapping[str, Any]) -> None:
    where = f"{path}: split {untrusted.shown(split)}"
    untrusted.text(where, split, SPLIT_NAME, 100)
    if lacking := {"rows", "rows_per_shard", "shards", "table"} - set(part):
        raise StorageError(f"{where}: lacks {', '.join(sorted(lacking))}; restore it from a copy")
    rows = untrusted.integer(f"{where}: rows", part["rows"], 0, _MOST_ROWS)
    each = untrusted.integer(f"{where}: rows_per_shard", part["rows_per_shard"], 1, _MOST_ROWS)
    shards = untrusted.sequence(f"{where}: shards", part["shards"], _MOST_ROWS)
    entries = [untrusted.mapping(f"{where}: a shard", shard) for shard in shards]
    counts = [min(each, rows - start) for start in range(0, rows, each)] if rows <= each * len(entries) else []
    if [entry.get("records") for entry in entries] != counts:
        raise StorageError(f"{where}: its shards do not hold its {rows} rows; restore it from a copy")
    names = [entry.get("file") for entry in entries]
    if names != [f"{split}/s{number:05d}.tar" for number in range(len(entries))] or part["table"] != f"{split}.parquet":
        raise StorageError(f"{where}: its files are not those of a split; restore it from a copy")
