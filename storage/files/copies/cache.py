"""Local copies of remote shards: checked by hash on arrival, named by their content, limited in size.

By default every process has its own folder, which is removed when the process ends. A folder that is given explicitly
is kept, and any number of processes may use it. A file appears complete, by a rename, under its SHA-256; so two
processes that fetch the same shard write the same file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from nfm.storage.errors import CorruptShard, MissingShard, StorageError, cannot_write
from nfm.storage.errors.arguments import checked, checked_later, function, text, whole
from nfm.storage.files import remote
from nfm.storage.files.copies.cache_folder import own_folder, shared_folder
from nfm.storage.files.durable import StoredFile
from nfm.storage.files.paths import TEMPORARY, inside, is_remote, local_path, temporary_name
from nfm.storage.files.places import cache_base, stated_number

T = TypeVar("T")
_TRIES = 3
_BOUND = whole(1)  # bytes
_EVICTED_MOST = 20  # times that other processes may evict a file between its arrival and its opening


class ShardCache:
    """Fetches files into a folder and keeps the most recently used ones, up to `max_bytes`.

    `folder`: by default a folder for this process alone, under `$NFM_CACHE` or the user's cache folder. It is removed
    when the process ends; after a kill, the next process that makes one removes it. `max_bytes`: by default
    `$NFM_CACHE_BYTES`, or half of what is free on the disk plus what the cache holds.

    Eviction removes the name of a file. A process that has the file mapped can go on reading it; the disk space is free
    when the last map is closed. Threads may share a cache and then fetch each file once. After a fork the child starts
    with a new cache.
    """

    @checked()
    def __init__(self, folder: str | Path | None = None, max_bytes: int | None = None) -> None:
        self._given = None if folder is None else local_path(folder)
        self._max_bytes = max_bytes if max_bytes is not None else _stated_bound()
        self._begin()
        _caches.add(self)

    def _begin(self) -> None:
        self._folder: Path | None = None
        self._lock = threading.Lock()
        self._arrived = threading.Condition()
        self._fetching: dict[str, threading.Lock] = {}
        self._kept: dict[str, int] = {}  # bytes of files being fetched or opened, which this process does not evict
        self._keepers: Counter[str] = Counter()
        self.evictions = 0  # files that this process has evicted so far

    def __reduce__(self) -> tuple[type[ShardCache], tuple[Path | None, int | None]]:
        return ShardCache, (self._given, self._max_bytes)

    @property
    def folder(self) -> Path:
        """The folder that holds the files."""
        with self._lock:
            if self._folder is None:
                try:
                    self._folder = own_folder() if self._given is None else shared_folder(self._given)
                except OSError as error:
                    raise cannot_write(self._given or cache_base(), error) from error
            return self._folder

    @property
    def max_bytes(self) -> int:
        """The current limit in bytes."""
        if self._max_bytes is not None:
            return self._max_bytes
        # The limit falls when others fill the disk: n such caches together end at n / (n + 1) of it.
        return (shutil.disk_usage(self.folder).free + sum(size for _, size, _ in self._files())) // 2

    @checked(sha256=text, bytes=whole())
    def local(self, path: Path, sha256: str, bytes: int) -> Path:
        """A local path of the file: itself, or its copy, fetched if needed. To read the file, use `opened`.

        Raises MissingShard; CorruptShard (three downloads differ from what was committed); StorageError (the object
        store fails, the disk is full, or the file is larger than the limit).
        """
        return self.together(path.parent, [StoredFile(path.name, sha256, bytes)])[0]

    @checked(files=checked_later)
    def together(self, root: Path, files: Sequence[StoredFile]) -> list[Path]:
        """Like `local`, for files of the store at `root` that are needed together: none is evicted for another."""
        with self._keeping(root, files):
            return [self._have(root, file) for file in files]

    @checked(sha256=text)
    def holds(self, sha256: str) -> bool:
        """Whether a file is in the cache now.

        Readers ask this when `evictions` has grown, and close maps of evicted files.
        """
        return (self.folder / sha256).exists()

    @checked(files=checked_later, opener=function)
    def opened(self, root: Path, files: Sequence[StoredFile], opener: Callable[[list[Path]], T]) -> T:
        """Calls `opener` with local files of the store at `root`, which stay until it returns. It only opens them.

        Another process that shares the folder may still evict one; it is then fetched again. Raises as `local` does.
        """
        if not is_remote(root):
            return opener([inside(root, file.path) for file in files])
        gone: Exception | None = None
        with self._keeping(root, files):
            for _ in range(_EVICTED_MOST):
                paths = [self._have(root, file) for file in files]
                try:
                    return opener(paths)
                except (MissingShard, FileNotFoundError) as error:
                    gone = error
        raise StorageError(
            f"{self.folder}: other processes evict {root / files[0].path} before it can be opened, {_EVICTED_MOST} "
            "times; raise NFM_CACHE_BYTES, or give each process a folder of its own"
        ) from gone

    @contextlib.contextmanager
    def _keeping(self, root: Path, files: Sequence[StoredFile]) -> Iterator[None]:
        """Protects files from eviction and reserves room for them.

        All of them are protected at once, or none: so two threads never wait for each other. Waits until the files that
        other threads protect leave enough room.
        """
        mine = {_name(root, file): file.bytes for file in files} if is_remote(root) else {}
        if not mine:
            yield
            return
        with self._arrived:
            while not self._fits(mine, root / files[0].path):
                self._arrived.wait()
            self._kept |= mine
            self._keepers.update(mine.keys())
        try:
            yield
        finally:
            with self._arrived:
                for name in mine:
                    self._keepers[name] -= 1
                    if not self._keepers[name]:
                        del self._keepers[name], self._kept[name]
                self._arrived.notify_all()

    def _fits(self, mine: Mapping[str, int], path: Path) -> bool:
        total, bound = sum(mine.values()), self.max_bytes
        if total > bound:
            if all(map(self.holds, mine)):  # nothing has to be fetched
                return True
            raise StorageError(
                f"{path}: needs {total} bytes of cache, {self.folder} is bounded to {bound}; raise NFM_CACHE_BYTES, or "
                "name a larger disk in NFM_CACHE"
            )
        return sum({**self._kept, **mine}.values()) <= bound

    def _have(self, root: Path, file: StoredFile) -> Path:
        path = inside(root, file.path)
        if not is_remote(path):
            return path
        target = self.folder / file.sha256
        if not _used(target, file.bytes):
            with self._lock:
                turn = self._fetching.setdefault(file.sha256, threading.Lock())
            with turn:
                if not _used(target, file.bytes):
                    self._fetch(path, file, target)
            with self._lock:
                self._fetching.pop(file.sha256, None)
        return target

    def _fetch(self, path: Path, file: StoredFile, target: Path) -> None:
        with self._arrived:
            self._make_room()
        for tries in range(1, _TRIES + 1):
            problem = _arrive(path, file, target)
            if problem is None:
                return
            time.sleep(0.1 * tries)
        raise CorruptShard(f"{path}: {problem}, {_TRIES} times; run `nfm pairs verify` on its store")

    def _make_room(self) -> None:
        """Evicts the least recently used files until there is room for all protected ones, present or not."""
        own = f"{TEMPORARY}{os.getpid()}-"  # downloads of this process are already counted at their full size
        others = [found for found in self._files() if not found[0].startswith(own) and found[0] not in self._kept]
        excess = sum(size for _, size, _ in others) + sum(self._kept.values()) - self.max_bytes
        for name, size, _ in sorted(others, key=lambda found: found[2]):
            if excess <= 0:
                break
            if not name.startswith(TEMPORARY):
                (self.folder / name).unlink(missing_ok=True)
                self.evictions += 1
                excess -= size

    def _files(self) -> list[tuple[str, int, int]]:
        """(name, bytes, time of last use in ns) of each file in the cache."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    found.append((entry.name, stat.st_size, stat.st_mtime_ns))
        return found


def _name(root: Path, file: StoredFile) -> str:
    if not re.fullmatch("[0-9a-f]{64}", file.sha256):  # it becomes a file name
        raise CorruptShard(f"{root / file.path}: {file.sha256!r} is no SHA-256; run `nfm pairs verify` on its store")
    return file.sha256


def default_cache() -> ShardCache:
    """The default cache of this process, made at the first call."""
    global _default
    with _default_lock:
        if _default is None:
            _default = ShardCache()
        return _default


_caches: weakref.WeakSet[ShardCache] = weakref.WeakSet()
_default: ShardCache | None = None
_default_lock = threading.Lock()


def _after_fork() -> None:
    """A child process has no threads, so its caches start with free locks and new folders."""
    global _default_lock
    _default_lock = threading.Lock()
    for cache in _caches:
        cache._begin()


os.register_at_fork(after_in_child=_after_fork)


def _used(target: Path, size: int) -> bool:
    """Whether the complete file is here. If so, it becomes the most recently used."""
    try:
        if target.stat().st_size != size:
            return False
        now = time.time_ns()
        os.utime(target, ns=(now, now))
    except FileNotFoundError:
        return False
    return True


def _arrive(path: Path, file: StoredFile, target: Path) -> str | None:
    """Downloads a file. Returns what is wrong with the download, or None if it is right."""
    temporary = target.parent / temporary_name(file.sha256)
    sha, size = hashlib.sha256(), 0
    try:
        with open(temporary, "xb", buffering=0) as out:
            for piece in remote.read_pieces(path, file.bytes):
                sha.update(piece)
                size += len(piece)
                _write_all(out.write, piece)
        if size == file.bytes and sha.hexdigest() == file.sha256:
            os.replace(temporary, target)
            return None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingShard(f"{path}: the file is missing; run `nfm pairs verify` on its store") from error
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    if size != file.bytes:
        return f"{size} bytes arrived, {file.bytes} were committed"
    return f"SHA-256 {sha.hexdigest()[:12]} arrived, {file.sha256[:12]} was committed"


def _write_all(write: Callable[[memoryview], int | None], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[write(view) or 0 :]


def _stated_bound() -> int | None:
    stated = stated_number("NFM_CACHE_BYTES", "bytes", 1e18)
    return None if stated is None else int(_BOUND("NFM_CACHE_BYTES", int(stated)))
