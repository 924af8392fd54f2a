"""The contents of a commit, and how they are checked when a commit is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nfm.storage.errors import StorageError
from nfm.storage.format import untrusted
from nfm.storage.format.moments import Moments, check_moments
from nfm.storage.format.spec import check_format, parse_name

ATTEMPT = r"[A-Za-z0-9_-]{1,100}"
_PAYLOAD = re.compile(rf"shards/(d\d{{3}}-s\d{{5}})\.({ATTEMPT})(\.tar)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The record that makes a shard exist. `payload` and `index` are paths relative to the store.

    In layout zarr the payload is a folder, and `parts` lists its files: field, sha256, bytes. Then `payload_sha256` is
    the content digest of the parts.
    """

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
    clipped: int = 0  # noise values beyond the codec's range
    parts: tuple[Mapping[str, Any], ...] = ()
    precision: str = "float32"
    batch_size: int | None = None
    threads: int | None = None
    seconds: float = 0.0
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    device: str = "cpu"
    noise_error: float | None = None  # RMS error of the noise against a float64 reference, if it was measured


_KNOWN = frozenset(field.name for field in dataclasses.fields(Commit))
_NEEDED = tuple(field.name for field in dataclasses.fields(Commit) if field.default is dataclasses.MISSING)


def check_files(where: str, body: Mapping[str, Any], name: str, prefix: str) -> tuple[Mapping[str, Any], ...]:
    """Checks what a commit (prefix `payload_`) or a manifest says about the files of a shard. Returns the parts.

    Only paths that an attempt can write are allowed, so no path leads out of the store.
    """
    payload = untrusted.text(f"{where}: payload", body["payload"], most=200)
    match = _PAYLOAD.fullmatch(payload)
    if match is None or match[1] != name or body["index"] != f"index/{name}.{match[2]}.parquet":
        raise StorageError(
            f"{where}: {untrusted.shown(payload)} and {untrusted.shown(body['index'])} are not its files"
        )
    for key in (f"{prefix}sha256", "index_sha256"):
        untrusted.sha256(f"{where}: {key}", body[key])
    for key in (f"{prefix}bytes", "index_bytes"):
        untrusted.integer(f"{where}: {key}", body[key])
    untrusted.integer(f"{where}: records", body["records"], 1)
    listed = untrusted.sequence(f"{where}: parts", body.get("parts", ()), 64)
    if bool(listed) == bool(match[3]):
        raise StorageError(f"{where}: {payload!r} with {len(listed)} parts; a folder has parts, a tar none")
    parts = tuple(untrusted.mapping(f"{where}: a part", part) for part in listed)
    for part in parts:
        untrusted.text(f"{where}: the field of a part", part.get("field"), "[a-z][a-z0-9_]*", 40)
        untrusted.sha256(f"{where}: the sha256 of a part", part.get("sha256"))
        untrusted.integer(f"{where}: the bytes of a part", part.get("bytes"))
    return parts


def parse(path: Path, name: str, body: Mapping[str, Any]) -> Commit:
    """The commit of the shard `name`, from the contents of `path`. Raises StorageError or NewerSchema."""
    check_format(path, body)
    where = str(path)
    again = "set it aside and run the pairs stage again"
    lacking = [key for key in _NEEDED if key not in body and key != "versions"]
    if lacking:
        raise StorageError(f"{where}: no complete commit, it lacks {', '.join(lacking)}; {again}")
    if body["name"] != name:
        raise StorageError(f"{where}: is the commit of {str(body['name'])[:40]}; {again}")
    draw, shard = parse_name(name)
    if (body["draw"], body["shard"]) != (draw, shard):
        raise StorageError(f"{where}: its draw and shard are not those of its name; {again}")
    parts = check_files(where, body, name, "payload_")
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
    return Commit(**{key: value for key, value in body.items() if key in _KNOWN} | {"parts": parts})
