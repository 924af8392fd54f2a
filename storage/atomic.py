"""Files that are either absent or whole: temporary file, fsync, then link (create) or rename (replace).

A process that dies at any point leaves at most a file named `.tmp-PID-TOKEN-NAME`, which nobody reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from nfm.storage.errors import StorageError, cannot_write

TEMPORARY = ".tmp-"
_CHUNK = 4 << 20


def canonical_json(body: Any) -> bytes:
    """The one JSON text of `body`: sorted keys, no spaces, UTF-8.

    NaN, infinities and keys that are no strings raise StorageError, naming where they stand.
    """
    return json.dumps(
        _plain(body, "body"), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest(data: bytes) -> str:
    """SHA-256, as hex."""
    return hashlib.sha256(data).hexdigest()


def content_digest(digests: Iterable[str]) -> str:
    """The digest of an artifact's content: over its payload digests, one a line, in their order."""
    return digest("\n".join(digests).encode())


def hash_file(path: str | Path) -> tuple[str, int]:
    """SHA-256 (hex) and size in bytes of a file. Raises StorageError when it cannot be read."""
    sha, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                sha.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise StorageError(f"{path}: cannot read ({error.strerror}); restore it or run `nfm audit`") from error
    return sha.hexdigest(), size


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path`, replacing what is there; readers see the old file or the new, never a part."""
    with HashingFile(path) as file:
        file.write(data)


def create_bytes(path: str | Path, data: bytes) -> bool:
    """Writes `data` to `path` only if nothing is there. Of many writers exactly one gets True."""
    if os.path.lexists(path):
        return False
    file = HashingFile(path, replace=False)
    with file:
        file.write(data)
    return file.published


def write_json(path: str | Path, body: Mapping[str, Any]) -> None:
    """Writes `body` with a `digest` of itself, replacing what is there."""
    write_bytes(path, _signed(path, body))


def create_json(path: str | Path, body: Mapping[str, Any]) -> bool:
    """Writes `body` with a `digest` of itself if nothing is there; False when something is."""
    return create_bytes(path, _signed(path, body))


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in `path`; its `digest`, where it has one, must be right. Raises StorageError."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise StorageError(f"{path}: no such file; was the stage that writes it run to its end?") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot read ({error.strerror}); check its permissions") from error
    try:
        body = json.loads(data)
    except ValueError as error:
        raise StorageError(f"{path}: not valid JSON ({error}); {_RESTORE}") from error
    if not isinstance(body, dict):
        raise StorageError(f"{path}: holds a JSON {type(body).__name__}, an object was expected; {_RESTORE}")
    stated = body.get("digest")
    if stated is not None and stated != _digest_of(body, str(path)):
        raise StorageError(f"{path}: its contents do not match its digest {str(stated)[:12]}; {_RESTORE}")
    return body


_RESTORE = "restore it from a copy, or set it aside and run the stage again"


def is_temporary(path: str | Path) -> bool:
    """Whether a file is one of our unpublished temporary files, to be ignored by every reader."""
    return Path(path).name.startswith(TEMPORARY)


def clear_temporaries(folder: str | Path, idle_seconds: float = 3600.0) -> list[Path]:
    """Removes the temporary files under `folder` not written to for `idle_seconds`; returns them."""
    removed = []
    for path in Path(folder).rglob(TEMPORARY + "*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and time.time() - path.stat().st_mtime >= idle_seconds:
                path.unlink()
                removed.append(path)
    return removed


class HashingFile:
    """A file being written: SHA-256 and size are taken on the way, the name appears when all is durable.

    As a context manager it publishes on a clean exit and removes its temporary file on any error. With
    `replace=False` an existing file is left alone and `published` is False. Raises StorageError when the
    disk is full.
    """

    def __init__(self, path: str | Path, replace: bool = True) -> None:
        self.path = Path(path)
        self.replace = replace
        self.published = False
        self.bytes = 0
        self._sha = hashlib.sha256()
        name = f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{self.path.name}"
        self._temporary = self.path.parent / name
        try:
            if not self.path.parent.is_dir():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _sync_folder(self.path.parent.parent)
            self._file = open(self._temporary, "xb", buffering=0)  # noqa: SIM115  closed by publish
        except OSError as error:
            raise cannot_write(self.path, error) from error

    @property
    def sha256(self) -> str:
        """Hex digest of what was written so far."""
        return self._sha.hexdigest()

    def write(self, data: bytes | memoryview) -> int:
        """Appends all of `data` (any contiguous buffer); returns its size in bytes."""
        view = memoryview(data).cast("B")
        self._sha.update(view)
        written = 0
        try:
            while written < view.nbytes:  # an unbuffered write may be partial near the end of the space
                written += self._file.write(view[written:]) or 0
        except OSError as error:
            self.discard()
            raise cannot_write(self.path, error) from error
        self.bytes += written
        return written

    def publish(self) -> None:
        """Makes the bytes durable, then gives them their name."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            if self.replace:
                os.replace(self._temporary, self.path)
                self.published = True
            else:
                self.published = _link(self._temporary, self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Closes and removes the temporary file; harmless after `publish`."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.publish()
        else:
            self.discard()


def _link(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # NFS may repeat a request that succeeded and answer "exists"; the link count tells the truth.
        return os.stat(temporary).st_nlink == 2
    return True


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _signed(path: str | Path, body: Mapping[str, Any]) -> bytes:
    plain = _plain({key: value for key, value in body.items() if key != "digest"}, str(path))
    plain["digest"] = _digest_of(plain, str(path))
    return (json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _digest_of(body: Mapping[str, Any], where: str) -> str:
    rest = {key: value for key, value in body.items() if key != "digest"}
    return digest(canonical_json(_plain(rest, where)))


def _plain(value: Any, where: str) -> Any:
    """`value` in JSON's own types, so that what is written reads back with the same digest."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item(), where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise StorageError(f"{where}: {value} is no JSON number; store null, or see where it came from")
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise StorageError(f"{where}: the key {key!r} is no string; write it as one")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise StorageError(f"{where}: a {type(value).__name__} has no JSON form; convert it first")
