"""Checks a table of shards by the rules of `manifests._check_entry`, for all rows at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_ATTEMPT = "[A-Za-z0-9_-]{1,100}"
_SHA256 = r"\A[0-9a-f]{64}\z"
_MOST_PARTS = 64
Mask = npt.NDArray[np.bool_]


def first_wrong(table: pa.Table) -> int | None:
    """The first row that is not a valid shard; None if all are valid."""
    right = np.ones(table.num_rows, bool)
    for column in table.columns[:-1]:
        right &= ~_true(pc.is_null(column))
    if right.all():
        right &= _files(table)
        right &= _parts(table["parts"], _true(pc.ends_with(table["payload"], pattern=".tar")))
    wrong = np.flatnonzero(~right)
    return int(wrong[0]) if len(wrong) else None


def _files(table: pa.Table) -> Mask:
    """Whether names and paths are those that attempts write, and digests and sizes are valid."""
    name, payload = table["name"], table["payload"]
    right = _matches(name, r"\Ad\d{3}-s\d{5}\z")
    right &= _matches(payload, rf"\Ashards/d\d{{3}}-s\d{{5}}\.{_ATTEMPT}(\.tar)?\z")
    right &= _true(pc.equal(pc.utf8_slice_codeunits(payload, 7, 18), name))
    index = pc.replace_substring_regex(payload, r"\Ashards/([^.]*\.[^.]*)(\.tar)?\z", r"index/\1.parquet")
    right &= _true(pc.equal(index, table["index"]))
    for key in ("sha256", "index_sha256", "commit_sha256"):
        right &= _matches(table[key], _SHA256)
    for key, least in (("bytes", 0), ("index_bytes", 0), ("records", 1)):
        right &= _true(pc.greater_equal(table[key], least))
    return right


def _parts(column: pa.ChunkedArray, tar: Mask) -> Mask:
    """Whether tars have no parts and folders have some."""
    if column.null_count == len(column):
        return tar
    counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    right = (counts <= _MOST_PARTS) & ((counts == 0) == tar)
    parts, row = pc.list_flatten(column), pc.list_parent_indices(column).to_numpy()
    fields = [pc.struct_field(parts, key) for key in ("field", "sha256", "bytes")]
    good = _matches(fields[0], r"\A[a-z][a-z0-9_]{0,39}\z") & _matches(fields[1], _SHA256)
    good &= _true(pc.fill_null(pc.greater_equal(fields[2], 0), False))
    right[row[~good]] = False
    return right


def _matches(column: pa.ChunkedArray, pattern: str) -> Mask:
    return _true(pc.fill_null(pc.match_substring_regex(column, pattern=pattern), False))


def _true(mask: pa.ChunkedArray) -> Mask:
    found: Mask = mask.to_numpy() if isinstance(mask, pa.ChunkedArray) else mask.to_numpy(zero_copy_only=False)
    return np.asarray(found, bool)
