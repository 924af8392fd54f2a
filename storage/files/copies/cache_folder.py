"""Folders for local copies of remote files: one for each process, removed when it ends, or a given one."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import secrets
import shutil
import time
from multiprocessing.util import Finalize
from pathlib import Path

from nfm.storage.files.paths import TEMPORARY
from nfm.storage.files.places import cache_base

_ABANDONED = 3600.0  # seconds after which an unfinished download in a shared folder counts as abandoned
_held: list[int] = []  # locks of this process's own folders


def shared_folder(folder: Path) -> Path:
    """Prepares a given folder. Only abandoned downloads are removed from it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(TEMPORARY + "*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()
    return folder


def own_folder() -> Path:
    """Makes a folder for this process, with a lock file beside it. Removes folders whose process has ended."""
    base = cache_base()
    base.mkdir(parents=True, exist_ok=True)
    for lock in base.glob("p*.lock"):
        _remove_if_dead(lock)
    while True:
        lock = base / f"p{os.getpid()}-{secrets.token_hex(4)}.lock"
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with contextlib.suppress(OSError):  # without locks on this file system, nobody can take ours for abandoned
            fcntl.flock(handle, fcntl.LOCK_EX)
        if lock.exists():  # otherwise another process removed the file before it was locked
            break
        os.close(handle)
    _held.append(handle)
    folder = lock.with_suffix("")
    folder.mkdir()
    # Unlike atexit, this also runs in multiprocessing's children.
    Finalize(None, _remove, (folder, lock), exitpriority=0)
    return folder


@functools.cache
def spool_folder() -> Path:
    """This process's folder for files that will be uploaded to an object store."""
    return own_folder()


def release_after_fork() -> None:
    """In a child: closes its copies of the parent's locks. The parent keeps them, so they end with the parent."""
    spool_folder.cache_clear()
    while _held:
        os.close(_held.pop())


def _remove_if_dead(lock: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(lock, os.O_RDWR)
        try:
            # The kernel releases it when its process ends, in any way.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock.with_suffix(""), lock)
        finally:
            os.close(handle)


def _remove(folder: Path, lock: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.unlink(missing_ok=True)


os.register_at_fork(after_in_child=release_after_fork)
