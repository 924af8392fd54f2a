"""Objects that change only if nobody else changed them meanwhile: conditional puts (nfm.storage.files.clouds).

A put that is repeated after a lost answer is refused although it succeeded. Then what is stored is read back, so no two
puts may have the same data.
"""

from __future__ import annotations

import functools
import secrets
from pathlib import Path

from nfm.storage.errors import NoPlace, StorageError
from nfm.storage.files import clouds, remote
from nfm.storage.files.clouds import failures
from nfm.storage.files.clouds.cloud import Cloud, Stored
from nfm.storage.files.paths import as_path, remove

_UNKNOWN = (400, 501)  # answers of servers that do not know the condition


class NoConditions(StorageError):  # noqa: N818 - it reads as what it says
    """The object store does not keep to conditions. The message names it."""


def read(path: Path) -> Stored | None:
    """The object at a URL; None if there is none. Raises StorageError."""
    try:
        return remote.attempt(path, "read", cloud_of(path).read)
    except FileNotFoundError:
        return None


def create(path: Path, data: bytes) -> str | None:
    """Writes an object if there is none. Returns its tag, or None if there is another one. Raises StorageError."""
    return _put(path, data, None)


def replace(path: Path, data: bytes, tag: str) -> str | None:
    """Writes an object if the stored version is the one of `tag`. Returns the new tag, or None if it is not.

    Raises StorageError.
    """
    return _put(path, data, tag)


def cloud_of(path: Path) -> Cloud:
    """The object store of a URL. Raises NoPlace for any other place."""
    if (cloud := clouds.of(path)) is None:
        raise NoPlace(str(path), f"no lock can be kept there; copy it to a folder or to {clouds.PLACES} and name that")
    return cloud


def _put(path: Path, data: bytes, tag: str | None) -> str | None:
    cloud = cloud_of(path)
    gave_up: StorageError | None = None
    try:
        made = remote.attempt(path, "write", lambda fs, name: cloud.put(fs, name, data, tag))
        if made is not None:
            return made
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
    create_only, replace_only = cloud_of(path).CONDITIONS
    try:
        first = _told(root, create(path, b"first"))
        if create(path, b"another") is not None:
            raise _fault(root, f"it overwrites an object that a put with {create_only} must leave alone")
        second = _told(root, replace(path, b"second", first))
        if second == first or replace(path, b"third", first) is not None:
            raise _fault(root, f"it overwrites an object whose tag is not the one of {replace_only}")
    except NoConditions:
        raise
    except StorageError as error:
        if error.__cause__ is not None and failures.status_of(error.__cause__) in _UNKNOWN:
            raise _fault(root, f"it refuses puts with {create_only} or {replace_only} ({error.__cause__})") from error
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
