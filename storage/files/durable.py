"""Writes a file that is hashed on the way and stays invisible until it is complete and durable.

Local: a temporary file, fsync, then link (create) or rename (replace). Object store: a local temporary file, then one
put, which is conditional if nothing may be there yet. A process that dies at any point leaves at most a file named
`.tmp-PID-TOKEN-NAME`, which no reader opens.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nfm.storage.errors import StorageError, cannot_write
from nfm.storage.files import remote
from nfm.storage.files.copies.cache_folder import spool_folder
from nfm.storage.files.copies.large import put_new
from nfm.storage.files.paths import as_path, is_remote, temporary_name
from nfm.storage.files.places import cache_base

_LARGE = 1 << 20  # bytes; a piece of at least this size is hashed in a second thread while this one writes it
_WRITEBACK = 32 << 20  # bytes between two hints to the kernel


@dataclass(frozen=True)
class StoredFile:
    """A durable file: its path, SHA-256 (hex) and size in bytes.

    The path is relative to the store if a commit or a manifest names the file. Otherwise it is the path that the writer
    was given.
    """

    path: str
    sha256: str
    bytes: int


class Unfinished(ABC):
    """A file or shard being written: a context manager that closes it on a clean exit, and discards it on an error."""

    @abstractmethod
    def close(self) -> Any:
        """Makes everything durable, and gives it its name."""

    @abstractmethod
    def discard(self) -> None:
        """Removes what was written."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


class HashingFile(Unfinished):
    """A file being written. SHA-256 and size are computed on the way; the name appears when everything is durable.

    With `replace=False` an existing file is left alone and `published` is False. Raises StorageError if the disk is
    full or the object store cannot be written.
    """

    def __init__(self, path: str | Path, replace: bool = True) -> None:
        self.path = as_path(path)
        self.replace = replace
        self.published = False
        self.bytes = 0
        self._sha = hashlib.sha256()
        self._hasher: ThreadPoolExecutor | None = None
        self._hinted = 0
        self._remote = is_remote(self.path)
        try:
            folder = spool_folder() if self._remote else self.path.parent
            self._temporary = folder / temporary_name(self.path.name)
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                sync_folder(folder.parent)
            self._file = open(self._temporary, "xb", buffering=0)  # noqa: SIM115  closed by `close`
        except OSError as error:
            raise self._cannot_write(error) from error

    @property
    def sha256(self) -> str:
        """Hex digest of what was written so far."""
        return self._sha.hexdigest()

    @property
    def stored(self) -> StoredFile:
        """What was written, as a StoredFile."""
        return StoredFile(str(self.path), self.sha256, self.bytes)

    def write(self, data: bytes | memoryview) -> int:
        """Appends all of `data` (any contiguous buffer).

        Returns its size in bytes. The caller may then reuse the buffer.
        """
        view = memoryview(data).cast("B")
        hashed = self._hash(view)
        try:
            written = 0
            while written < view.nbytes:  # an unbuffered write may be partial when the disk is nearly full
                written += self._file.write(view[written:]) or 0
            self.bytes += written
            if not self._remote and self.bytes - self._hinted >= _WRITEBACK:
                _start_writeback(self._file.fileno(), self._hinted, self.bytes - self._hinted)
                self._hinted = self.bytes
        except OSError as error:
            hashed()
            self.discard()
            raise self._cannot_write(error) from error
        hashed()
        return written

    def _hash(self, view: memoryview) -> Callable[[], Any]:
        """Hashes a piece, a large one in a second thread. Call the result to wait for it."""
        if view.nbytes < _LARGE:
            self._sha.update(view)
            return _nothing
        if self._hasher is None:
            self._hasher = ThreadPoolExecutor(1, thread_name_prefix="nfm-hash")
        return self._hasher.submit(self._sha.update, view).result

    def close(self) -> None:
        """Makes the bytes durable, then gives the file its name."""
        try:
            if self._remote:
                self._file.close()
                self.published = self._put()
                return
            os.fsync(self._file.fileno())
            self._file.close()
            if self.replace:
                os.replace(self._temporary, self.path)
                self.published = True
            else:
                self.published = _link(self._temporary, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        finally:
            self.discard()

    def _put(self) -> bool:
        source = str(self._temporary)
        if self.replace:
            remote.attempt(self.path, "write", lambda fs, name: fs.put_file(source, name))
            return True
        return remote.create(self.path, lambda fs, name: put_new(fs, name, source), self._is_what_is_stored)

    def _is_what_is_stored(self) -> bool:
        size = remote.attempt(self.path, "look at", lambda fs, name: fs.info(name))["size"]
        if size != self.bytes:
            return False
        sha = hashlib.sha256()
        for piece in remote.read_pieces(self.path, self.bytes):
            sha.update(piece)
        return sha.digest() == self._sha.digest()

    def _cannot_write(self, error: OSError) -> StorageError:
        return cannot_write(error.filename or cache_base() if self._remote else self.path, error)

    def discard(self) -> None:
        """Closes and removes the temporary file. Does nothing after `close`."""
        if self._hasher is not None:
            self._hasher.shutdown()
            self._hasher = None
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Makes the file names in a local folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _nothing() -> None:
    """Nothing to wait for: the piece was hashed at once."""


def _link(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # NFS may repeat a request that succeeded and answer "exists". The link count shows what happened.
        return os.stat(temporary).st_nlink == 2
    return True


@functools.cache
def _sync_file_range() -> Any:
    return getattr(ctypes.CDLL(None), "sync_file_range", None)  # only Linux has it


def _start_writeback(handle: int, start: int, size: int) -> None:
    """Asks the kernel to start writing these bytes to the disk, so that the final fsync is short."""
    hint = _sync_file_range()
    if hint is not None:
        hint(handle, ctypes.c_int64(start), ctypes.c_int64(size), 2)  # SYNC_FILE_RANGE_WRITE
