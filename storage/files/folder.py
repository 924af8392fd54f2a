"""Lists a folder in one pass: its names, and the sizes of its files.

A store of 200,000 shards has that many files in each of three folders. To check each by name, with every link on its
path, would take minutes.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nfm.storage.files import clouds, remote
from nfm.storage.files.paths import inside, is_remote, names_in
from nfm.storage.files.small_files import MOST_BYTES, read_bytes


def names(root: Path, folder: str) -> Iterator[str]:
    """The names in a folder of a store, in no order; none if there is no such folder.

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

    Links are left out. If the folder itself is a link, the result is empty. So every listed file lies in the store;
    other files must be checked by name.
    """
    path = root / folder
    if is_remote(root):
        return {name: facts.bytes for name, facts in objects_in(path).items()}
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
        pass  # the folder was removed meanwhile, or was never there: then files are checked by name
    return found


def shard_files(root: Path) -> dict[str, int]:
    """Bytes of every plain file in the folders of payloads and index parts, by path relative to the store."""
    return {f"{folder}/{name}": size for folder in ("shards", "index") for name, size in sizes(root, folder).items()}


@dataclass(frozen=True)
class Facts:
    """Bytes of a file, and the Unix time of its last change; of an object by the clock of its server, with its tag."""

    bytes: int
    changed: float
    tag: str = ""


def below(folder: Path) -> dict[str, Facts]:
    """Every file and every link below a folder, by path relative to it.

    Links are not followed, even if the folder is one. A file that vanishes meanwhile counts as changed just now.
    """
    if is_remote(folder):
        return _objects_below(folder)
    found: dict[str, Facts] = {}
    for inside_it, folders, files in os.walk(folder) if not folder.is_symlink() else ():
        links = [name for name in folders if os.path.islink(os.path.join(inside_it, name))]
        for path in (os.path.join(inside_it, name) for name in [*files, *links]):
            try:
                status = os.lstat(path)
                facts = Facts(status.st_size, status.st_mtime)
            except FileNotFoundError:
                facts = Facts(0, time.time())
            found[os.path.relpath(path, folder)] = facts
    return found


def _objects_below(folder: Path) -> dict[str, Facts]:
    try:
        listed: Any = remote.attempt(folder, "list", lambda fs, name: fs.find(name, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    prefix = str(getattr(folder, "path")).rstrip("/") + "/"  # noqa: B009 not an attribute of pathlib's paths
    return {name.removeprefix(prefix): _facts_of(folder, item) for name, item in listed.items()}


def objects_in(folder: Path) -> dict[str, Facts]:
    """The objects directly in a folder of a bucket, by name; none if there is no such folder."""
    try:
        listed: Any = remote.attempt(folder, "list", lambda fs, name: fs.ls(name, detail=True, refresh=True))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {str(item["name"]).rpartition("/")[2]: _facts_of(folder, item) for item in listed if item["type"] == "file"}


def _facts_of(folder: Path, item: dict[str, Any]) -> Facts:
    """The facts in an entry of a listing of fsspec's."""
    cloud = clouds.of(folder)
    changed, tag = cloud.facts(item) if cloud is not None else (None, "")
    return Facts(int(item["size"]), time.time() if changed is None else changed, tag)


class Folder:
    """A context manager for reading many small files of one folder of a store.

    Local files are opened relative to the folder, so its path is resolved only once.
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
        """The contents of a plain file; None for anything else, which the caller must explain."""
        if is_remote(self._path):
            try:
                return read_bytes(self._path / name)
            except FileNotFoundError:
                return None
        if self._handle is None:
            return None
        try:  # opening a pipe does not block, and links are not followed
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
