"""The contents of a commit, and how they are checked when a commit is read."""

from __future__ import annotations

import dataclasses
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nfm.storage.errors import StorageError
from nfm.storage.files.durable import StoredFile
from nfm.storage.format import untrusted
from nfm.storage.format.moments import Moments, check_moments
from nfm.storage.format.spec import FORMAT, check_format, parse_name

ATTEMPT = r"[A-Za-z0-9_-]{1,100}"
_PAYLOAD = re.compile(rf"shards/(d\d{{3}}-s\d{{5}})\.({ATTEMPT})(\.tar)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ShardFiles:
    """The files of a shard, by their paths relative to the store: its payload and its index part.

    In layout zarr the payload is a folder, and `parts` are its files, one a field. `payload.sha256` is then the content
    digest of the parts.
    """

    name: str
    payload: StoredFile
    index: StoredFile
    records: int
    parts: tuple[StoredFile, ...] = ()

    @property
    def draw(self) -> int:
        """The draw of the shard."""
        return parse_name(self.name)[0]

    @property
    def shard(self) -> int:
        """The number of the shard in its draw."""
        return parse_name(self.name)[1]


@dataclass(frozen=True, kw_only=True)
class Commit(ShardFiles):
    """The record that makes a shard exist."""

    attempt: str
    keys_digest: str
    moments: Moments
    clipped: int = 0  # noise values beyond the codec's range
    precision: str = "float32"
    batch_size: int | None = None
    threads: int | None = None
    seconds: float = 0.0
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    device: str = "cpu"
    noise_error: float | None = None  # RMS error of the noise against a float64 reference, if it was measured

    def to_json(self) -> dict[str, Any]:
        """What stands in the commit's file."""
        body = {
            "format": FORMAT,
            "name": self.name,
            "draw": self.draw,
            "shard": self.shard,
            "attempt": self.attempt,
            **file_to_json("payload", self.payload, "payload_"),
            **file_to_json("index", self.index, "index_"),
            "records": self.records,
            "keys_digest": self.keys_digest,
            "moments": self.moments,
            "clipped": self.clipped,
            "parts": [part_to_json(part) for part in self.parts],
            **{key: getattr(self, key) for key in _HOW},
        }
        if self.noise_error is None:  # not measured: written as in earlier versions
            del body["noise_error"]
        return body


_HOW = ("precision", "batch_size", "threads", "seconds", "versions", "device", "noise_error")
_NEEDED = ("name", "draw", "shard", "attempt", "payload", "payload_sha256", "payload_bytes", "index", "index_sha256",
           "index_bytes", "records", "keys_digest", "moments")  # fmt: skip


def file_to_json(key: str, file: StoredFile, prefix: str) -> dict[str, Any]:
    """How a commit or a manifest states a file."""
    return {key: file.path, f"{prefix}sha256": file.sha256, f"{prefix}bytes": file.bytes}


def part_to_json(part: StoredFile) -> dict[str, Any]:
    """How a commit or a manifest states a part of a payload: by its field."""
    return {"field": posixpath.basename(part.path), "sha256": part.sha256, "bytes": part.bytes}


def part_of(payload: str, part: Mapping[str, Any]) -> StoredFile:
    """The part of a payload that `part_to_json` stated."""
    return StoredFile(f"{payload}/{part['field']}", part["sha256"], part["bytes"])


def _files(where: str, body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a commit says of its shard's files, checked, as `ShardFiles` has it.

    Only paths that an attempt can write are allowed, so no path leads out of the store.
    """
    payload = untrusted.text(f"{where}: payload", body["payload"], most=200)
    match = _PAYLOAD.fullmatch(payload)
    if match is None or match[1] != name or body["index"] != f"index/{name}.{match[2]}.parquet":
        raise StorageError(
            f"{where}: {untrusted.shown(payload)} and {untrusted.shown(body['index'])} are not its files"
        )
    files = {
        key: StoredFile(
            body[key],
            untrusted.sha256(f"{where}: {key}_sha256", body[f"{key}_sha256"]),
            untrusted.integer(f"{where}: {key}_bytes", body[f"{key}_bytes"]),
        )
        for key in ("payload", "index")
    }
    records = untrusted.integer(f"{where}: records", body["records"], 1)
    listed = untrusted.sequence(f"{where}: parts", body.get("parts", ()), 64)
    if bool(listed) == bool(match[3]):
        raise StorageError(f"{where}: {payload!r} with {len(listed)} parts; a folder has parts, a tar none")
    for part in listed:
        part = untrusted.mapping(f"{where}: a part", part)
        untrusted.text(f"{where}: the field of a part", part.get("field"), "[a-z][a-z0-9_]*", 40)
        untrusted.sha256(f"{where}: the sha256 of a part", part.get("sha256"))
        untrusted.integer(f"{where}: the bytes of a part", part.get("bytes"))
    return {**files, "name": name, "records": records, "parts": tuple(part_of(payload, part) for part in listed)}


def parse(path: Path, name: str, body: Mapping[str, Any]) -> Commit:
    """The commit of the shard `name`, from the contents of `path`. Raises StorageError or NewerSchema."""
    check_format(path, body)
    where = str(path)
    again = "`nfm repair` on its store sets it aside and says what makes it again"
    lacking = [key for key in _NEEDED if key not in body]
    if lacking:
        raise StorageError(f"{where}: no complete commit, it lacks {', '.join(lacking)}; {again}")
    if body["name"] != name:
        raise StorageError(f"{where}: is the commit of {str(body['name'])[:40]}; {again}")
    draw, shard = parse_name(name)
    if (body["draw"], body["shard"]) != (draw, shard):
        raise StorageError(f"{where}: its draw and shard are not those of its name; {again}")
    files = _files(where, body, name)
    if body["payload"].split(".")[1] != body["attempt"]:
        raise StorageError(f"{where}: its attempt is not that of its files; {again}")
    untrusted.sha256(f"{where}: keys_digest", body["keys_digest"])
    check_moments(f"{where}: moments", body["moments"])
    untrusted.integer(f"{where}: clipped", body.get("clipped", 0))
    for key in ("precision", "device"):
        untrusted.text(f"{where}: {key}", body.get(key, ""))
    for key in ("batch_size", "threads"):
        if body.get(key) is not None:
            untrusted.integer(f"{where}: {key}", body[key])
    untrusted.real(f"{where}: seconds", body.get("seconds", 0.0))
    if body.get("noise_error") is not None and untrusted.real(f"{where}: noise_error", body["noise_error"]) < 0:
        raise StorageError(f"{where}: noise_error {body['noise_error']} is negative; {again}")
    versions = untrusted.mapping(f"{where}: versions", body.get("versions", {}))
    for version in versions.values():
        untrusted.text(f"{where}: versions", version)
    told = ("attempt", "keys_digest", "moments", "clipped", *_HOW)
    return Commit(**files, **{key: body[key] for key in told if key in body})
