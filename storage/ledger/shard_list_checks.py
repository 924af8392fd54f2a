"""Checks a table of shards by the rules of a commit's files, for all rows at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nfm.storage.format.commit import ATTEMPT

_SHA256 = r"\A[0-9a-f]{64}\z"
_MOST_PARTS = 64
Mask = npt.NDArray[np.bool_]


def first_wrong(table: pa.Table) -> tuple[int, str] | None:
    """(row, column) of the first value that is not valid; None if all are."""
    for key, right in _rules(table):
        if not right.all():
            return int(np.argmin(right)), key
    return None


def _rules(table: pa.Table) -> Iterator[tuple[str, Mask]]:
    """Which rows are valid, by column: names and paths are those that attempts write, digests and sizes are valid."""
    for key in table.column_names[:-1]:
        yield key, ~_true(pc.is_null(table[key]))
    name, payload = table["name"], table["payload"]
    yield "name", _matches(name, r"\Ad\d{3}-s\d{5}\z")
    own = _true(pc.equal(pc.utf8_slice_codeunits(payload, 7, 18), name))
    yield "payload", own & _matches(payload, rf"\Ashards/d\d{{3}}-s\d{{5}}\.{ATTEMPT}(\.tar)?\z")
    index = pc.replace_substring_regex(payload, r"\Ashards/([^.]*\.[^.]*)(\.tar)?\z", r"index/\1.parquet")
    yield "index", _true(pc.equal(index, table["index"]))
    for key in ("sha256", "index_sha256", "commit_sha256"):
        yield key, _matches(table[key], _SHA256)
    for key, least in (("bytes", 0), ("index_bytes", 0), ("records", 1)):
        yield key, _true(pc.greater_equal(table[key], least))
    yield "parts", _parts(table["parts"], _true(pc.ends_with(payload, pattern=".tar")))


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
