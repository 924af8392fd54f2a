"""Objects that change only if nobody else changed them meanwhile: conditional puts of S3 (If-None-Match, If-Match).

A put that is repeated after a lost answer is refused although it succeeded. Then what is stored is read back, so no two
puts may have the same data.
"""

from __future__ import annotations

import functools
import secrets
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from nfm.storage.errors import StorageError
from nfm.storage.files import remote
from nfm.storage.files.paths import as_path, remove

_REFUSED = 412
_UNKNOWN = (400, 501)  # answers of servers that do not know the header
_bare: set[str] = set()  # buckets of servers, such as Ceph's, that know a tag only without its quotation marks


class NoConditions(StorageError):  # noqa: N818 - it reads as what it says
    """The object store does not keep to conditions. The message names it."""


@dataclass(frozen=True)
class Stored:
    """What an object holds, the tag of this version, and its age in seconds by the server's clock."""

    data: bytes
    tag: str
    age: float = 0.0


def read(path: Path) -> Stored | None:
    """The object at a URL; None if there is none. Raises StorageError."""
    from fsspec.asyn import sync

    async def get(fs: Any, name: str) -> Stored:
        bucket, key, _ = fs.split_path(name)
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return Stored(await answer["Body"].read(), answer["ETag"], (now - answer["LastModified"]).total_seconds())

    try:
        return remote.attempt(path, "read", lambda fs, name: sync(fs.loop, get, fs, name))
    except FileNotFoundError:
        return None


def create(path: Path, data: bytes) -> str | None:
    """Writes an object if there is none. Returns its tag, or None if there is another one. Raises StorageError."""
    return _put(path, data, IfNoneMatch="*")


def replace(path: Path, data: bytes, tag: str) -> str | None:
    """Writes an object if the stored version is the one of `tag`. Returns the new tag, or None if it is not.

    Raises StorageError.
    """
    bucket, bare = str(path).split("/")[2], tag.strip('"')
    if bucket not in _bare:
        if (new := _put(path, data, IfMatch=tag)) is not None:
            return new
        if bare == tag or (stored := read(path)) is None or stored.tag != tag:
            return None
    if (new := _put(path, data, IfMatch=bare)) is not None:
        _bare.add(bucket)
    return new


def _put(path: Path, data: bytes, **condition: str) -> str | None:
    def put(fs: Any, name: str) -> str | None:
        bucket, key, _ = fs.split_path(name)
        try:
            return str(fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)["ETag"])
        except OSError as error:
            if remote.status_of(error) == _REFUSED:
                return None
            raise

    gave_up: StorageError | None = None
    try:
        if (tag := remote.attempt(path, "write", put)) is not None:
            return tag
    except FileNotFoundError:  # the object that was to be replaced is gone
        return None
    except StorageError as error:  # all answers were lost: the result is unknown
        gave_up = error
    try:
        stored = read(path)
    except StorageError:
        raise gave_up or StorageError(f"{path}: cannot be read back; run the same command again") from gave_up
    if stored is not None and stored.data == data:
        return stored.tag
    if gave_up is not None:
        raise gave_up
    return None


@functools.lru_cache(maxsize=8)
def check(root: str) -> None:
    """Shows, once in a process, that the object store of a root keeps to conditions. Raises NoConditions if not.

    Five requests; the object that is written for it is removed.
    """
    path = as_path(root) / f".conditions-{secrets.token_hex(8)}"
    try:
        first = _told(root, create(path, b"first"))
        if create(path, b"another") is not None:
            raise _fault(root, "it overwrites an object that a put with If-None-Match must leave alone")
        second = _told(root, replace(path, b"second", first))
        if second == first or replace(path, b"third", first) is not None:
            raise _fault(root, "it overwrites an object whose tag is not the one of If-Match")
    except NoConditions:
        raise
    except StorageError as error:
        if error.__cause__ is not None and remote.status_of(error.__cause__) in _UNKNOWN:
            raise _fault(root, f"it refuses puts with If-None-Match or If-Match ({error.__cause__})") from error
        raise
    finally:
        remove(path)


def _told(root: str, tag: str | None) -> str:
    if tag is None:
        raise _fault(root, "it refuses a put whose condition holds")
    return tag


def _fault(root: str, what: str) -> NoConditions:
    return NoConditions(
        f"{root}: this object store has no conditional writes: {what}. Two runs could not be kept apart there; let "
        "NFM_ARTIFACTS name a bucket of a store that has them, or a folder"
    )
