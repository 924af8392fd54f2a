"""Where a lock is kept: in a file of a local folder, or in an object of a bucket.

Both hold one JSON object, the holder's. Whoever wants the lock calls `create`, and `take_over` if its holder is dead.
Of all processes that try, one succeeds. `beat` and `release` change nothing if somebody else took over.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path
from typing import Any, Protocol

from nfm.pipeline.artifacts import conditional
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.files.clouds.cloud import Stored
from nfm.storage.files.paths import is_remote

Body = dict[str, Any]
TAKEOVER_SECONDS = 10.0  # a takeover of a file needs milliseconds; one that lasts so long has died


class LockPlace(Protocol):
    """What the lock needs of a place. Errors are StorageErrors, locally also OSErrors."""

    path: Path

    def read(self) -> Body:
        """What the holder wrote; empty if nobody holds the lock."""
        ...

    def age(self) -> float:
        """Seconds since the holder wrote last; 0 if nobody holds the lock."""
        ...

    def create(self, body: Body) -> bool:
        """Takes the lock. Returns False if somebody holds it."""
        ...

    def take_over(self, body: Body, seen: Body) -> bool:
        """Takes the lock from the holder who wrote `seen`. Returns False if that is not the holder any more."""
        ...

    def beat(self, body: Body) -> bool:
        """Writes a new body of the holder. Returns False if somebody else holds the lock."""
        ...

    def release(self, body: Body) -> None:
        """Gives the lock back."""
        ...


def place_for(folder: Path) -> LockPlace:
    """The place of the lock of a folder. Raises NoPlace where no lock can be kept."""
    if not is_remote(folder):
        return LockFile(folder / "lock.json")
    conditional.cloud_of(folder)
    return LockObject(folder / "lock.json")


class LockFile:
    """A lock in a local file. It is created only if absent; a takeover is guarded by a marker that is, too."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Body:
        try:
            return _ours(self.path, atomic.read_json(self.path))
        except StorageError:
            if os.path.lexists(self.path):
                raise
            return {}

    def age(self) -> float:
        try:
            return time.time() - self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def create(self, body: Body) -> bool:
        return atomic.create_json(self.path, body)

    def take_over(self, body: Body, seen: Body) -> bool:
        marker = self.path.with_name(f"lock.{seen['id']}.taken")
        if not atomic.create_bytes(marker, body["id"].encode()):
            time.sleep(0.1)
            if self.read().get("id") == seen["id"] and not _taker_lives(marker):
                marker.unlink(missing_ok=True)
            return False
        still_stale = self.read().get("id") == seen["id"]  # checked again now that the marker keeps others out
        if still_stale:
            atomic.write_json(self.path, body)
        marker.unlink(missing_ok=True)
        return still_stale

    def beat(self, body: Body) -> bool:
        if self.read().get("id") != body["id"]:
            return False
        atomic.write_json(self.path, body)
        return True

    def release(self, body: Body) -> None:
        if self.read().get("id") == body["id"]:
            self.path.unlink(missing_ok=True)


class LockObject:
    """A lock in an object of a bucket. Every change is a conditional put on the version that was read or written last.

    No delete is conditional everywhere. So a lock that is given back stays as an object that says so.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tag = ""  # of the version that this process wrote last
        self._seen: tuple[str, str] = ("", "")  # of the version that was read last: its digest, its tag

    def read(self) -> Body:
        stored, body = self._read()
        self._seen = (body["digest"], stored.tag) if stored is not None else ("", "")
        return {} if body.get("free") else body

    def age(self) -> float:
        stored, body = self._read()
        return 0.0 if stored is None or body.get("free") else stored.age

    def create(self, body: Body) -> bool:
        conditional.check(str(self.path.parent.parent.parent))
        if self._written(conditional.create(self.path, self._text(body))):
            return True
        stored, found = self._read()
        if stored is None or not found.get("free"):
            return False
        return self._written(conditional.replace(self.path, self._text(body), stored.tag))

    def take_over(self, body: Body, seen: Body) -> bool:
        digest, tag = self._seen
        return seen["digest"] == digest and self._written(conditional.replace(self.path, self._text(body), tag))

    def beat(self, body: Body) -> bool:
        if self._written(conditional.replace(self.path, self._text(body), self._tag)):
            return True
        # The tag of the last version is unknown if all answers to its put were lost. Nobody else writes this id.
        stored, found = self._read()
        if stored is None or found["id"] != body["id"]:
            return False
        return self._written(conditional.replace(self.path, self._text(body), stored.tag))

    def release(self, body: Body) -> None:
        with contextlib.suppress(StorageError):  # a server that does not answer: the lock becomes stale by itself
            self.beat({**body, "free": True})

    def _text(self, body: Body) -> bytes:
        return atomic.digested_text(self.path, body)

    def _written(self, tag: str | None) -> bool:
        self._tag = tag or self._tag
        return tag is not None

    def _read(self) -> tuple[Stored | None, Body]:
        stored = conditional.read(self.path)
        return stored, _ours(self.path, atomic.checked(self.path, stored.data)) if stored is not None else {}


def _ours(path: Path, seen: Body) -> Body:
    """The contents of a lock. Its names are checked, because they become file names."""
    texts = all(isinstance(seen.get(key), str) for key in ("id", "host", "space", "command", "since"))
    numbers = all(isinstance(seen.get(key), int) for key in ("pid", "beat"))
    if not (texts and numbers and re.fullmatch("[0-9a-f]{1,64}", seen["id"])):
        raise StorageError(f"{path}: no lock of ours; when nobody works on the folder, remove the file")
    return seen


def _taker_lives(marker: Path) -> bool:
    try:
        return time.time() - marker.stat().st_mtime < TAKEOVER_SECONDS
    except FileNotFoundError:
        return True
