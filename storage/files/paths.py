"""Operations on a place: a local folder, or a URL that fsspec knows (s3://, gs://, az://, memory://).

Requests to URLs go through here: they are tried again after a temporary error, fail with a clear message, and work in
forked processes. pathlib's own methods on a URL do none of this.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from nfm.storage.errors import NoPlace, StorageError
from nfm.storage.files import clouds, remote
from nfm.storage.files.parallel import parallel
from nfm.storage.files.places import (
    artifacts_root,
    as_path,
    is_remote,
    is_url,
    local_path,
    scratch_root,
    stated_path,
)

__all__ = [
    "TEMPORARY",
    "artifacts_root",
    "as_path",
    "exists",
    "inside",
    "is_remote",
    "is_url",
    "local_path",
    "move_objects",
    "names_in",
    "remove",
    "scratch_root",
    "several",
    "size_below",
    "size_of",
    "stated_path",
    "store_named",
    "temporary_name",
]  # fmt: skip

Item = TypeVar("Item")
Result = TypeVar("Result")
TEMPORARY = ".tmp-"
_FINGERPRINT = re.compile(r"(?:pairs/)?([0-9a-f]{4,64})")  # or its beginning
_REQUESTS = 16  # small requests at a time


def inside(root: Path, name: str) -> Path:
    """The file or folder `name` of a store. Raises StorageError if the name, or a link, leads out of the store.

    Pipes and devices are refused too, because opening one may block for ever. A missing file is left to its reader.
    """
    path = root / name
    if name.startswith("/") or ".." in name.split("/"):
        raise StorageError(f"{path}: the name leads out of the store; restore what names it from a copy")
    if is_remote(path):
        return path
    real = os.path.realpath(path)
    if not f"{real}/".startswith(f"{os.path.realpath(root).rstrip('/')}/"):
        raise StorageError(f"{path}: a link out of the store, to {real}; put the file itself there")
    try:
        mode = os.stat(real).st_mode
    except OSError:
        return path
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise StorageError(f"{path}: neither a file nor a folder; move it away and restore the file from a copy")
    return path


def temporary_name(name: str) -> str:
    """A name for an unpublished local file that no other writer uses."""
    return f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{name}"


def several(where: Path, action: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`action` of each item, in order. If `where` is remote they run at the same time, because requests mostly wait."""
    if not is_remote(where):
        return [action(item) for item in items]
    return list(parallel(action, items, _REQUESTS))


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; none if there is no such folder."""
    try:
        if not is_remote(folder):
            return sorted(path.name for path in folder.iterdir())
        found = remote.attempt(folder, "list", lambda fs, name: fs.ls(name, detail=False, refresh=True))
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = {str(name).rstrip("/").rpartition("/")[2] for name in found if str(name).rstrip("/") != _plain(folder)}
    return sorted(names)


def size_of(path: Path) -> int | None:
    """Size of a file in bytes; None if there is no such file."""
    try:
        if not is_remote(path):
            return path.stat().st_size if path.is_file() else None
        found = remote.attempt(path, "look at", lambda fs, name: fs.info(name))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return int(found["size"]) if found["type"] == "file" else None


def size_below(folder: Path) -> int:
    """Bytes of all files in a folder and in those below it."""
    if not is_remote(folder):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    found = remote.attempt(folder, "list", lambda fs, name: fs.find(name, detail=True))
    return sum(int(facts["size"]) for facts in found.values())


def exists(path: Path) -> bool:
    """Whether there is a file or a folder."""
    if not is_remote(path):
        return path.exists()
    try:
        remote.attempt(path, "look at", lambda fs, name: fs.info(name))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def remove(path: Path) -> None:
    """Removes a file; does nothing if there is none."""
    if not is_remote(path):
        path.unlink(missing_ok=True)
        return
    try:
        remote.attempt(path, "remove", lambda fs, name: fs.rm_file(name))
    except FileNotFoundError:
        return


def remove_below(folder: Path) -> None:
    """Removes a folder with all that is below it, if it is there."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    found = remote.attempt(folder, "list", lambda fs, name: fs.find(name))
    several(folder, lambda name: remove(folder / name[len(_plain(folder)) :].lstrip("/")), found)


def move_objects(source: Path, target: Path) -> None:
    """Moves an object, or all objects of a folder, within a bucket. They are removed when all have been copied."""
    found = remote.attempt(source, "list", lambda fs, name: fs.find(name))
    below = len(_plain(source))
    for name in found:
        copied = _plain(target) + name[below:]
        remote.attempt(source, "copy", lambda fs, _, name=name, copied=copied: clouds.copy(fs, name, copied))  # type: ignore[misc]
    for name in found:
        remote.attempt(source, "remove", lambda fs, _, name=name: fs.rm_file(name))  # type: ignore[misc]


def store_named(where: str | Path) -> Path:
    """A place as in `as_path`, or a store of `artifacts_root()` by the beginning of its name: `pairs/3fa9c1`, `3fa9c1`.

    A path that exists wins. Raises NoPlace if there is neither, StorageError if several names begin so.
    """
    path = as_path(where)
    if is_remote(path) or os.path.lexists(path):
        return path
    start = _FINGERPRINT.fullmatch(where) if isinstance(where, str) else None
    if start is None:
        name = (
            "" if path.is_absolute() else f" in {Path.cwd()}, nor the beginning of a fingerprint, 4 hex digits or more"
        )
        raise NoPlace(str(where), f"no such folder{name}; `nfm ls` lists the stores")
    stores = artifacts_root() / "pairs"
    begun = [stores / name for name in names_in(stores) if name.startswith(start[1])]
    found = [store for store in begun if exists(store / "spec.json")]
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise StorageError(f"{where} names several stores in {stores}: {names}; write more of the fingerprint")
    if not found:
        told = f"no such folder in {Path.cwd()}, and no store in {stores} has a name that begins so"
        raise NoPlace(str(where), f"{told}; `nfm ls` lists them, NFM_ARTIFACTS says where they are")
    return found[0]


def _plain(folder: Path) -> str:
    return str(getattr(folder, "path", folder)).rstrip("/")
