"""Where a store is: a folder of this machine, or a URL that fsspec knows (s3://, gs://, memory://).

What is asked of a URL goes through here, so that it is tried again when the object store has a bad moment, fails with a
message for people, and works in forked processes; pathlib's own methods of a URL do neither.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

from nfm.storage import remote
from nfm.storage.errors import StorageError

Item = TypeVar("Item")
Result = TypeVar("Result")
TEMPORARY = ".tmp-"
_REQUESTS = 16  # small requests at a time


def as_path(where: str | Path) -> Path:
    """A local path as pathlib's, a URL as universal_pathlib's: both have pathlib's methods.

    Options of a file system (an endpoint, a profile) come from its own environment variables and from fsspec's
    configuration. Listings are never cached: other processes write beside this one. Tested against an S3 server and
    memory://; gs:// takes the same calls of fsspec, and is untested.
    """
    if not isinstance(where, str):
        return where
    protocol, separator, _ = where.partition("://")
    if not separator:
        return Path(where)
    try:
        from upath import UPath

        if protocol in ("file", "local"):
            return Path(UPath(where).path)
        return cast(Path, UPath(where, **_options(protocol)))
    except ImportError as error:
        raise StorageError(f"{where}: {error}; URLs need the packages universal_pathlib and s3fs (or gcsfs)") from error
    except ValueError as error:
        raise StorageError(f"{where}: {error}; use a folder, s3://bucket/..., gs://bucket/... or file://") from error


def _options(protocol: str) -> dict[str, Any]:
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        from fsspec.config import conf

        # botocore's own retries would multiply with those of `remote.attempt`: minutes before an endpoint that is down.
        own = conf.get(protocol, {}).get("config_kwargs")
        options["config_kwargs"] = own or {"retries": {"total_max_attempts": 1, "mode": "standard"}}
    return options


def inside(root: Path, name: str) -> Path:
    """The file or folder `name` of a store; raises StorageError when the name, or a link, leads out of the store.

    Pipes and devices are refused too: to open one may wait for ever. What is missing is for its reader to say.
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


def is_remote(path: Any) -> bool:
    """Whether a path of `as_path` is an object store's, where files are put whole and nothing is mapped."""
    return not isinstance(path, Path)


def temporary_name(name: str) -> str:
    """The name of an unpublished local file, unlike that of any other writer."""
    return f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{name}"


def several(where: Path, action: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`action` of each item, in their order: at the same time where `where` is remote, since requests mostly wait."""
    if not is_remote(where):
        return [action(item) for item in items]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(action, items))


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; none when there is no such folder."""
    try:
        if not is_remote(folder):
            return sorted(path.name for path in folder.iterdir())
        found = remote.attempt(folder, "list", lambda fs, name: fs.ls(name, detail=False, refresh=True))
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = {str(name).rstrip("/").rpartition("/")[2] for name in found if str(name).rstrip("/") != _plain(folder)}
    return sorted(names)


def size_of(path: Path) -> int | None:
    """Size of a file in bytes, None when there is none."""
    try:
        if not is_remote(path):
            return path.stat().st_size if path.is_file() else None
        found = remote.attempt(path, "look at", lambda fs, name: fs.info(name))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return int(found["size"]) if found["type"] == "file" else None


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
    """Removes a file; nothing when there is none."""
    if not is_remote(path):
        path.unlink(missing_ok=True)
        return
    try:
        remote.attempt(path, "remove", lambda fs, name: fs.rm_file(name))
    except FileNotFoundError:
        return


def _plain(folder: Path) -> str:
    return str(getattr(folder, "path", folder)).rstrip("/")
