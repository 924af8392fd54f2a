"""Commits: a shard exists when its commit exists, and the first commit of a name wins.

A worker writes the payload and its index part under names of its own attempt, both durable, and only then
publishes the commit. Killed before that, it leaves files nobody refers to; two workers on one shard leave one
commit.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nfm.storage import layouts
from nfm.storage.errors import MissingShard, StorageError
from nfm.storage.files import folder as listing
from nfm.storage.files import signed_json
from nfm.storage.files.atomic import create_json, digest, hash_file, read_json
from nfm.storage.files.paths import as_path, exists, remove, several, size_of
from nfm.storage.format import codecs
from nfm.storage.format.commit import ATTEMPT, Commit, parse
from nfm.storage.format.index import index_rows, keys_digest, write_index
from nfm.storage.format.moments import Moments, MomentSums
from nfm.storage.format.spec import FORMAT, StoreSpec, parse_name, shard_name
from nfm.storage.layouts.tar import Array, Payload

__all__ = ["Commit", "Written", "commit_path", "committed", "names", "publish", "read", "read_many", "write_shard"]
_CHUNK = 1024  # commits in memory at a time


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
    clipped: int
    parts: tuple[Mapping[str, Any], ...]
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
            clipped=self.clipped,
            parts=self.parts,
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
    if not re.fullmatch(ATTEMPT, attempt):
        raise StorageError(f"attempt {attempt!r}: use letters, digits, - and _ only, it becomes part of file names")
    begin = time.monotonic()
    root, name, slots = as_path(root), shard_name(draw, shard), spec.slots_of(shard)
    earlier = read(root, name)
    if earlier is not None and earlier.attempt == attempt:
        raise StorageError(f"{root}: {name} is committed under attempt {attempt!r}; use a new attempt's name")
    sums, rows, clipped = MomentSums(), [], 0
    with layouts.writer(spec, root, name, attempt) as writer:
        for chunk in records:
            start = slots.start + writer.written
            arrays, beyond = _fields_of(writer.path, spec, chunk, start)
            sums.add(arrays["noise"], spec.noise_step)
            if sums.nonfinite:
                raise StorageError(
                    f"{writer.path}: {sums.nonfinite} values of the noise are not finite from slot {start} on; "
                    f"check the teacher, or use codec float32 if they overflow"
                )
            writer.append(arrays)
            rows.append(index_rows(draw, {**chunk, **arrays}))
            clipped += beyond
        payload, parts = layouts.closed(writer)
    try:
        index = write_index(root / "index" / f"{name}.{attempt}.parquet", rows)
    except StorageError:
        layouts.remove(payload.path, parts)
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
        clipped=clipped,
        parts=parts,
        seconds=time.monotonic() - begin,
    )


def publish(root: str | Path, commit: Commit) -> Commit:
    """Commits a shard if nobody has; returns the commit that stands, which may be an earlier one.

    A losing attempt's own files are removed. Raises MissingShard when the files of `commit` are not there.
    """
    root = as_path(root)
    path = commit_path(root, commit.name)
    staged = [(f"{commit.payload}/{part['field']}", part["bytes"]) for part in commit.parts]
    for file, size in (*(staged or [(commit.payload, commit.payload_bytes)]), (commit.index, commit.index_bytes)):
        if size_of(root / file) != size:
            earlier = read(root, commit.name)
            if earlier is not None:  # ours, sealed since, or another's, who then removed our files
                return earlier
            raise MissingShard(f"{root / file}: not there with {size} bytes; write the shard before its commit")
    body = dataclasses.asdict(commit)
    if body["noise_error"] is None:  # not measured: the commit reads as those of old
        del body["noise_error"]
    if create_json(path, {"format": FORMAT, **body}):
        return commit
    winner = read(root, commit.name)
    if winner is None:
        raise StorageError(f"{path}: vanished while it was read; who removes commits?")
    if winner.attempt != commit.attempt:
        layouts.remove(root / commit.payload, commit.parts)
        remove(root / commit.index)
    return winner


def commit_path(root: str | Path, name: str) -> Path:
    """Where the commit of the shard `name` stands."""
    return as_path(root) / "commits" / f"{name}.json"


def read(root: str | Path, name: str) -> Commit | None:
    """The commit of the shard `name`, None when there is none. Raises StorageError when it is damaged."""
    path = commit_path(root, name)
    if not exists(path):
        return None
    return parse(path, name, read_json(path, root=as_path(root)))


def names(root: str | Path, draws: int) -> list[str]:
    """The shards of draws 0 to `draws` - 1 that have a commit, in order: the folder is listed, nothing is read."""
    files = listing.names(as_path(root), "commits")
    found = (file[:-5] for file in files if _IS_COMMIT(file))
    return sorted(name for name in found if parse_name(name)[0] < draws)


_IS_COMMIT = re.compile(r"d\d{3}-s\d{5}\.json", re.ASCII).fullmatch


def committed(root: str | Path, draws: int) -> dict[str, Commit]:
    """The commits of draws 0 to `draws` - 1, by name, in order: all in memory at once, see `read_many`."""
    return {commit.name: commit for commit, _ in read_many(root, names(root, draws))}


def read_many(root: str | Path, names: Sequence[str]) -> Iterator[tuple[Commit, str]]:
    """The commits of these shards, each with the SHA-256 of its file, a part of them in memory at a time.

    One that has gone is left out. Raises StorageError when one is damaged.
    """
    where = as_path(root)
    with listing.Folder(where, "commits") as folder:

        def one(name: str) -> tuple[Commit, str] | None:
            path, data = commit_path(where, name), folder.read(f"{name}.json")
            if data is not None:
                try:
                    return parse(path, name, signed_json.checked(path, data, signed=True)), digest(data)
                except StorageError:
                    pass  # of an object store it may have been damaged on the way; else it is damaged again
            commit = read(where, name)
            return None if commit is None else (commit, hash_file(path)[0])

        for start in range(0, len(names), _CHUNK):
            yield from filter(None, several(where, one, names[start : start + _CHUNK]))


def _fields_of(path: Path, spec: StoreSpec, chunk: Mapping[str, Array], start: int) -> tuple[dict[str, Array], int]:
    """(the records as stored, how many values of the noise were clipped)."""
    missing = [field.name for field in spec.fields if field.name not in chunk]
    if missing:
        raise StorageError(f"{path}: the records lack {', '.join(missing)}; the spec lists them as fields")
    arrays = {field.name: np.asarray(chunk[field.name]) for field in spec.fields}
    try:
        arrays["noise"], clipped = codecs.encode(arrays["noise"], spec.codec, spec.noise_step)
    except StorageError as error:
        raise StorageError(f"{path}: {error} from slot {start} on; check the teacher") from error
    slot = arrays["slot"]
    if not np.array_equal(slot, np.arange(start, start + len(slot))):
        raise StorageError(f"{path}: slots {slot[:3]}... where {start} was next; write them in the order of the slots")
    return arrays, clipped
