"""Commits: a shard exists when its commit exists, and the first commit of a name wins.

A worker writes the payload and its index part under names of its own attempt, both durable, and only then
publishes the commit. Killed before that, it leaves files nobody refers to; two workers on one shard leave one
commit.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nfm.storage.atomic import create_json, is_temporary, read_json
from nfm.storage.errors import MissingShard, NewerSchema, StorageError
from nfm.storage.index import index_rows, keys_digest, write_index
from nfm.storage.moments import Moments, MomentSums
from nfm.storage.schema import FORMAT, StoreSpec, parse_name, shard_name
from nfm.storage.tar import Array, Payload, ShardWriter


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The record that makes a shard exist. `payload` and `index` are paths relative to the store."""

    name: str
    draw: int
    shard: int
    attempt: str
    payload: str
    payload_sha256: str
    payload_bytes: int
    index: str
    index_sha256: str
    index_bytes: int
    records: int
    keys_digest: str
    moments: Moments
    precision: str = "float32"
    batch_size: int | None = None
    threads: int | None = None
    seconds: float = 0.0
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Written:
    """A shard that is durable but not committed; paths are absolute or relative as the store's root was."""

    name: str
    draw: int
    shard: int
    attempt: str
    payload: Payload
    index: Payload
    records: int
    keys_digest: str
    moments: Moments
    seconds: float

    def commit(self, **how: Any) -> Commit:
        """The commit to publish; `how` gives precision, batch_size, threads, seconds, versions and device."""
        return Commit(
            name=self.name,
            draw=self.draw,
            shard=self.shard,
            attempt=self.attempt,
            payload=f"{self.payload.path.parent.name}/{self.payload.path.name}",
            payload_sha256=self.payload.sha256,
            payload_bytes=self.payload.bytes,
            index=f"{self.index.path.parent.name}/{self.index.path.name}",
            index_sha256=self.index.sha256,
            index_bytes=self.index.bytes,
            records=self.records,
            keys_digest=self.keys_digest,
            moments=self.moments,
            **({"seconds": self.seconds} | how),
        )


def write_shard(
    root: str | Path,
    spec: StoreSpec,
    draw: int,
    shard: int,
    attempt: str,
    records: Iterable[Mapping[str, Array]],
) -> Written:
    """Writes the payload and the index part of one shard, both durable on return; publishes no commit.

    Each item of `records` has arrays over n records: every field of the spec (the noise in float32, stored in
    the spec's codec), `slot` counting through `spec.slots_of(shard)`, and optionally `row` (default: the
    slot), `flip`, `group` and `nll`. Raises StorageError for wrong slots, shapes and types, for noise that is
    not finite, and when the disk is full; nothing is left behind then. Moments are of the noise as stored.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", attempt):
        raise StorageError(f"attempt {attempt!r}: use letters, digits, - and _ only, it becomes part of file names")
    begin = time.monotonic()
    root, name, slots = Path(root), shard_name(draw, shard), spec.slots_of(shard)
    earlier = read(root, name)
    if earlier is not None and earlier.attempt == attempt:
        raise StorageError(f"{root}: {name} is committed under attempt {attempt!r}; use a new attempt's name")
    path = root / "shards" / f"{name}.{attempt}.tar"
    sums, parts = MomentSums(), []
    with ShardWriter(path, spec.fields, len(slots), name, spec.rows_per_block) as writer:
        for chunk in records:
            start = slots.start + writer.written
            arrays = _fields_of(path, spec, chunk, start)
            sums.add(arrays["noise"])
            if sums.nonfinite:
                raise StorageError(
                    f"{path}: {sums.nonfinite} values of the noise are not finite from slot {start} on; "
                    f"check the teacher, or use codec float32 if they overflow"
                )
            writer.append(arrays)
            parts.append(index_rows(draw, {**chunk, **arrays}))
        payload = writer.close()
    try:
        index = write_index(root / "index" / f"{name}.{attempt}.parquet", parts)
    except StorageError:
        path.unlink(missing_ok=True)
        raise
    return Written(
        name=name,
        draw=draw,
        shard=shard,
        attempt=attempt,
        payload=payload,
        index=index,
        records=len(slots),
        keys_digest=keys_digest(draw, slots),
        moments=sums.result(),
        seconds=time.monotonic() - begin,
    )


def publish(root: str | Path, commit: Commit) -> Commit:
    """Commits a shard if nobody has; returns the commit that stands, which may be an earlier one.

    A losing attempt's own files are removed. Raises MissingShard when the files of `commit` are not there.
    """
    root = Path(root)
    for file, size in ((commit.payload, commit.payload_bytes), (commit.index, commit.index_bytes)):
        path = root / file
        if not path.is_file() or path.stat().st_size != size:
            raise MissingShard(f"{path}: not there with {size} bytes; write the shard before its commit")
    if create_json(commit_path(root, commit.name), {"format": FORMAT, **dataclasses.asdict(commit)}):
        return commit
    winner = read(root, commit.name)
    if winner is None:
        raise StorageError(f"{commit_path(root, commit.name)}: vanished while it was read; who removes commits?")
    if winner.attempt != commit.attempt:
        for file in (commit.payload, commit.index):
            (root / file).unlink(missing_ok=True)
    return winner


def commit_path(root: str | Path, name: str) -> Path:
    """Where the commit of the shard `name` stands."""
    return Path(root) / "commits" / f"{name}.json"


def read(root: str | Path, name: str) -> Commit | None:
    """The commit of the shard `name`, None when there is none. Raises StorageError when it is damaged."""
    path = commit_path(root, name)
    if not path.exists():
        return None
    body = read_json(path)
    if int(body.get("format", FORMAT)) > FORMAT:
        raise NewerSchema(f"{path}: format {body['format']}, this nfm-pairs reads up to {FORMAT}; install a newer one")
    known = {field.name for field in dataclasses.fields(Commit)}
    try:
        commit = Commit(**{key: value for key, value in body.items() if key in known})
    except TypeError as error:
        raise StorageError(
            f"{path}: no complete commit ({error}); set it aside and run the pairs stage again"
        ) from error
    if commit.name != name:
        raise StorageError(f"{path}: is the commit of {commit.name}; set it aside and run the pairs stage again")
    return commit


def committed(root: str | Path, draws: int) -> dict[str, Commit]:
    """The commits of draws 0 to `draws` - 1, by name, in order."""
    folder = Path(root) / "commits"
    found = sorted(os.listdir(folder)) if folder.is_dir() else []
    commits = {}
    for file in found:
        name = file.removesuffix(".json")
        if is_temporary(file) or name == file or parse_name(name)[0] >= draws:
            continue
        commit = read(root, name)
        if commit is not None:
            commits[name] = commit
    return commits


def _fields_of(path: Path, spec: StoreSpec, chunk: Mapping[str, Array], start: int) -> dict[str, Array]:
    missing = [field.name for field in spec.fields if field.name not in chunk]
    if missing:
        raise StorageError(f"{path}: the records lack {', '.join(missing)}; the spec lists them as fields")
    arrays = {field.name: np.asarray(chunk[field.name]) for field in spec.fields}
    with np.errstate(over="ignore"):  # what overflows the codec becomes infinite and is refused as such
        arrays["noise"] = arrays["noise"].astype(spec.codec, copy=False)
    slot = arrays["slot"]
    if not np.array_equal(slot, np.arange(start, start + len(slot))):
        raise StorageError(f"{path}: slots {slot[:3]}... where {start} was next; write them in the order of the slots")
    return arrays
