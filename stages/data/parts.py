"""Parts of a data set that is being made: which rows each has, its commit, and the images of all of them together.

The plan is a Parquet file with one row group a part: a worker reads the places of its own rows and lists nothing.
A part is a tar as the finished data set has them; it exists when its commit does. All of this is in a folder, or, where
workers share no disk, in the bucket of the artifact.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nfm.stages.data import records
from nfm.stages.data.source import Encoded, Places
from nfm.storage.dataset.shards import ReadyShard, written_shard
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.files.paths import exists, is_remote, remove, size_of
from nfm.storage.files.small_files import MOST_INDEX_BYTES, plain, read_bytes
from nfm.storage.format import untrusted
from nfm.storage.layouts import Shard

FOLDER = "parts"
_PLAN = f"{FOLDER}/plan.parquet"
_TYPES = {"path": pa.binary(), "problem": pa.string()}  # of columns that are no whole numbers
_HEAD = b"nfm"


@dataclass(frozen=True)
class Part:
    """Some rows of a source: their `positions` in the final order, and a digest of what decides their content."""

    name: str
    positions: np.ndarray
    digest: str


@dataclass(frozen=True)
class PartCommit:
    """The record that makes a part exist. `rejected` has reasons by place in the part; the file holds the other rows.

    A part without a usable image has no file.
    """

    name: str
    attempt: str
    rows_digest: str
    records: int
    bytes: int
    sha256: str
    rejected: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def file(self) -> str:
        return part_file(self.name, self.attempt)


def split_name(name: str) -> tuple[str, int]:
    """The split, or "listed", and the number of a part."""
    split, _, number = name.rpartition("-s")
    return split, int(number)


def part_file(name: str, attempt: str) -> str:
    return f"{FOLDER}/{name}.{attempt}.tar"


def planned(
    source: Encoded, rows: np.ndarray, labels: np.ndarray, own: int, each: int, size: Sequence[int]
) -> list[Part]:
    """The parts of `rows` with their labels, of which the first `own` are to train on, by at most `each` rows.

    Where any order of rows costs the same, a part is a shard of the final order and becomes one if nothing is set
    aside before or in it. Elsewhere a part follows the source's own order, so that every file is read in one go.
    """
    if source.seeks:
        pieces = [
            (f"{split}-s{number:05d}", np.arange(start, min(start + each, stop)))
            for split, begin, stop in (("train", 0, own), ("heldout", own, len(rows)))
            for number, start in enumerate(range(begin, stop, each))
        ]
    else:
        order = np.argsort(rows, kind="stable")
        pieces = [(f"listed-s{at // each:05d}", order[at : at + each]) for at in range(0, len(rows), each)]
    return [Part(name, at, _digest(rows[at], labels[at], size)) for name, at in pieces]


def _digest(rows: np.ndarray, labels: np.ndarray, size: Sequence[int]) -> str:
    whole = hashlib.sha256(f"{len(rows)} {list(size)}\n".encode())
    whole.update(np.ascontiguousarray(rows, np.int64).tobytes() + np.ascontiguousarray(labels, np.int64).tobytes())
    return whole.hexdigest()


def write_plan(
    out: Path, parts: Sequence[Part], source: Encoded, rows: np.ndarray, labels: np.ndarray, size: Sequence[int]
) -> None:
    """Writes what workers need to know of the source: the places of all rows, part by part."""
    head = {"names": [part.name for part in parts], "about": source.about(), "size": list(size)}
    sink, writer = io.BytesIO(), None
    for part in parts:
        own = rows[part.positions]
        columns = {"row": own, "label": labels[part.positions], **source.places(own)}
        schema = pa.schema([(name, _TYPES.get(name, pa.int64())) for name in columns])
        writer = writer or pq.ParquetWriter(sink, schema.with_metadata({_HEAD: json.dumps(head)}), compression="zstd")
        writer.write_table(pa.table(list(columns.values()), schema=schema), row_group_size=max(len(own), 1))
    if writer is not None:
        writer.close()
    atomic.write_bytes(out / _PLAN, sink.getvalue())


def plan_of(out: Path) -> Path | bytes:
    """The plan for `read_slice`: its path, or what a bucket holds, which is read once for all parts of a worker."""
    path = out / _PLAN
    return read_bytes(path, MOST_INDEX_BYTES) if is_remote(path) else path


@dataclass(frozen=True)
class Slice:
    """What a worker reads of the plan for one part."""

    labels: np.ndarray  # [n] int64
    places: Places
    about: dict[str, Any]
    size: tuple[int, int]
    digest: str


def read_slice(plan: Path | bytes, name: str) -> Slice:
    """The rows of one part. Raises StorageError if the plan is not there or lacks the part."""
    with io.BytesIO(plan) if isinstance(plan, bytes) else plain(plan) as file, pq.ParquetFile(file) as groups:
        head = untrusted.json_value(groups.schema_arrow.metadata[_HEAD])
        if name not in head["names"]:
            raise StorageError(f"{_PLAN} of the data stage has no part {name}: run again")
        columns = groups.read_row_group(head["names"].index(name)).to_pydict()
    rows, labels = (np.array(columns.pop(column), np.int64) for column in ("row", "label"))
    height, width = head["size"]
    return Slice(labels, columns, head["about"], (height, width), _digest(rows, labels, (height, width)))


def committed(out: Path, part: Part) -> PartCommit | None:
    """The commit of a part, None if there is none. One of other rows, or without its file, is taken away."""
    path = records.path_of(out, part.name)
    if not exists(path):
        return None
    try:
        found = records.read(PartCommit, out, part.name)
    except StorageError:
        found = None
    if (
        found is not None
        and found.rows_digest == part.digest
        and found.records + len(found.rejected) == len(part.positions)
    ):
        there = not found.records or size_of(out / found.file) == found.bytes
        if there:
            return found
    remove(path)
    return None


class Parts:
    """The images of all parts by their position in the final order, like an array [n, C, H, W] uint8."""

    dtype = np.dtype(np.uint8)

    def __init__(self, out: Path, parts: Sequence[Part], commits: Sequence[PartCommit], image_shape: Sequence[int]):
        total = sum(len(part.positions) for part in parts)
        self.out, self._commits, self.shape = out, commits, (total, *image_shape)
        self._part, self._at = np.full(total, -1), np.full(total, -1)
        self._open: dict[int, Shard] = {}
        self.rejected: dict[int, str] = {}
        for number, (part, commit) in enumerate(zip(parts, commits)):
            left = np.delete(part.positions, [int(place) for place in commit.rejected])
            self._part[left], self._at[left] = number, np.arange(len(left))
            self.rejected |= {int(part.positions[int(at)]): why for at, why in commit.rejected.items()}
        self.rejected = dict(sorted(self.rejected.items()))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """The images at these positions, none of which was rejected."""
        images = np.empty((len(positions), *self.shape[1:]), self.dtype)
        parts, at = self._part[positions], self._at[positions]
        for place in np.lexsort((at, parts)).tolist():
            images[place] = self._shard(int(parts[place])).read("image", int(at[place]), int(at[place]) + 1)[0]
        return images

    def ready(self, positions: np.ndarray, name: str) -> ReadyShard | None:
        """The part that is the shard `name` with exactly the images at these positions; None if no part is."""
        number = int(self._part[positions[0]])
        commit = self._commits[number]
        same = commit.name == name and commit.records == len(positions)
        if not same or not np.array_equal(self._at[positions], np.arange(len(positions))):
            return None
        if (self._part[positions] != number).any():
            return None
        return ReadyShard(self.out / commit.file, commit.sha256, commit.bytes)

    def _shard(self, number: int) -> Shard:
        if number not in self._open:
            commit = self._commits[number]
            self._open[number] = written_shard(self.out / commit.file, commit.records, self.shape[1:], "uint8")
        return self._open[number]
