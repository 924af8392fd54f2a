"""A folder of a store in one look: the names in it, and the sizes of its files.

A store of 200,000 shards has as many files in each of three folders; to ask for each by its name, through every link
that might be on the way, takes minutes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from nfm.storage.files import remote
from nfm.storage.files.paths import inside, is_remote, names_in
from nfm.storage.files.small_files import MOST_BYTES, read_bytes


def names(root: Path, folder: str) -> Iterator[str]:
    """The names in a folder of a store, in no order; none when there is no such folder.

    Raises StorageError for a link that leads out of the store.
    """
    path = inside(root, folder)
    if is_remote(root):
        yield from names_in(path)
        return
    try:
        with os.scandir(path) as found:
            yield from (entry.name for entry in found)
    except (FileNotFoundError, NotADirectoryError):
        return


def sizes(root: Path, folder: str) -> dict[str, int]:
    """Bytes of every plain file in a folder of a store, by name.

    Links are left out, and everything where a link stands in the folder's place: what is here lies in the store, and
    what is not must be asked for by its name.
    """
    path = root / folder
    if is_remote(root):
        return _remote_sizes(path)
    if path.is_symlink():
        return {}
    found: dict[str, int] = {}
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    found[entry.name] = status.st_size
    except (FileNotFoundError, NotADirectoryError):
        pass  # it goes away under us, or was never there: then the files are asked for by their names
    return found


def _remote_sizes(path: Path) -> dict[str, int]:
    try:
        listed: Any = remote.attempt(path, "list", lambda fs, name: fs.ls(name, detail=True, refresh=True))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    files = (cast(dict[str, Any], item) for item in listed if item["type"] == "file")
    return {str(item["name"]).rpartition("/")[2]: int(item["size"]) for item in files}


def shard_files(root: Path) -> dict[str, int]:
    """Bytes of every plain file in the folders of payloads and index parts, by its path relative to the store."""
    return {f"{folder}/{name}": size for folder in ("shards", "index") for name, size in sizes(root, folder).items()}


class Folder:
    """A folder of a store of which many small files are read: a context manager.

    Local files are opened relative to it, so that the way to it is walked once.
    """

    def __init__(self, root: Path, folder: str) -> None:
        self._path = root / folder
        self._handle: int | None = None

    def __enter__(self) -> Self:
        if not is_remote(self._path):
            try:
                self._handle = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except OSError:
                self._handle = None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def read(self, name: str) -> bytes | None:
        """The whole of a plain file; None for what is none, which its own reader must explain."""
        if is_remote(self._path):
            try:
                return read_bytes(self._path / name)
            except FileNotFoundError:
                return None
        if self._handle is None:
            return None
        try:  # a pipe does not make anybody wait, a link is not followed
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._handle)
        except OSError:
            return None
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
                return None
            data = os.read(file, status.st_size + 1)
            return data if len(data) == status.st_size else None
        except OSError:
            return None
        finally:
            os.close(file)
