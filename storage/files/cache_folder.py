"""Folders for copies of what is remote: one a process, gone when the process is; or one that is given, and kept."""

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

from nfm.storage.files.paths import TEMPORARY, stated_path

_ABANDONED = 3600.0  # seconds after which an unfinished download of a shared folder is nobody's
_held: list[int] = []  # locks of this process's own folders


def base_folder() -> Path:
    """Where the folders of processes are: `$NFM_CACHE`, else `nfm` in the user's cache folder."""
    return stated_path("NFM_CACHE") or (stated_path("XDG_CACHE_HOME") or Path.home() / ".cache") / "nfm"


def shared_folder(folder: Path) -> Path:
    """A folder that is given; only what nobody can be writing any more is removed from it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(TEMPORARY + "*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()
    return folder


def own_folder() -> Path:
    """A new folder of this process, with a lock file beside it; folders whose lock nobody holds are removed."""
    base = base_folder()
    base.mkdir(parents=True, exist_ok=True)
    for lock in base.glob("p*.lock"):
        _remove_if_dead(lock)
    while True:
        lock = base / f"p{os.getpid()}-{secrets.token_hex(4)}.lock"
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody takes ours for dead either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if lock.exists():  # else a cleaner was quicker than our lock
            break
        os.close(handle)
    _held.append(handle)
    folder = lock.with_suffix("")
    folder.mkdir()
    Finalize(None, _remove, (folder, lock), exitpriority=0)  # unlike atexit's, it runs in multiprocessing's children
    return folder


@functools.cache
def spool_folder() -> Path:
    """This process's folder for files on their way to an object store."""
    return own_folder()


def release_after_fork() -> None:
    """In a child: lets go of the parent's locks, which the parent goes on holding, so that they end with it."""
    spool_folder.cache_clear()
    while _held:
        os.close(_held.pop())


def _remove_if_dead(lock: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(lock, os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when its process dies, however
            _remove(lock.with_suffix(""), lock)
        finally:
            os.close(handle)


def _remove(folder: Path, lock: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.unlink(missing_ok=True)


os.register_at_fork(after_in_child=release_after_fork)
