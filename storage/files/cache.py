"""Copies of remote shards on this machine: hash-checked on arrival, named by their content, bounded in size.

By default every process has a folder of its own, which goes when it ends; readers share nothing. A folder that is
given explicitly is kept, and any number of processes may use it: a file appears whole, by a rename, under its SHA-256,
so that two that fetch the same shard write the same file.
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
from nfm.storage.files.cache_folder import base_folder, own_folder, shared_folder
from nfm.storage.files.durable import StoredFile
from nfm.storage.files.paths import TEMPORARY, inside, is_remote, local_path, temporary_name
from nfm.storage.files.places import stated_number

T = TypeVar("T")
_TRIES = 3
_BOUND = whole(1)  # bytes
_EVICTED_MOST = 20  # times that other processes may evict a file between its arrival and its opening


class ShardCache:
    """Fetches files to a folder and keeps the ones used last, up to `max_bytes`.

    `folder`: by default one for this process alone, under `$NFM_CACHE` or the user's cache folder. It is removed when
    the process ends (after a kill, by the next process that makes one). `max_bytes`: by default `$NFM_CACHE_BYTES`, or
    half of what the disk could give it.

    A file that is evicted loses its name. Whoever has it mapped goes on reading it, and its room is free when the last
    map is gone. Threads may share a cache, and then fetch a file once; after a fork the child begins with a new one.
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
        self._kept: dict[str, int] = {}  # bytes of what is being fetched or opened, which this process does not evict
        self._keepers: Counter[str] = Counter()
        self.evictions = 0  # files that this process has evicted so far

    def __reduce__(self) -> tuple[type[ShardCache], tuple[Path | None, int | None]]:
        return ShardCache, (self._given, self._max_bytes)

    @property
    def folder(self) -> Path:
        """Where the files are."""
        with self._lock:
            if self._folder is None:
                try:
                    self._folder = own_folder() if self._given is None else shared_folder(self._given)
                except OSError as error:
                    raise cannot_write(self._given or base_folder(), error) from error
            return self._folder

    @property
    def max_bytes(self) -> int:
        """The bound as of now."""
        if self._max_bytes is not None:
            return self._max_bytes
        # As others fill the disk this shrinks, so that n such caches end with n / (n + 1) of it.
        return (shutil.disk_usage(self.folder).free + sum(size for _, size, _ in self._files())) // 2

    @checked(sha256=text, bytes=whole())
    def local(self, path: Path, sha256: str, bytes: int) -> Path:
        """The file as a local one: itself, or its copy here, fetched if need be. To read it, use `opened`.

        Raises MissingShard, CorruptShard (what arrives is not what was committed, three times) and StorageError (the
        object store fails; the disk is full; the file is larger than the bound).
        """
        return self.together(path.parent, [StoredFile(path.name, sha256, bytes)])[0]

    @checked(files=checked_later)
    def together(self, root: Path, files: Sequence[StoredFile]) -> list[Path]:
        """The same for files of the store at `root` that are needed at once: none is evicted for another."""
        with self._keeping(root, files):
            return [self._have(root, file) for file in files]

    @checked(sha256=text)
    def holds(self, sha256: str) -> bool:
        """Whether a file is here now. Who keeps files mapped lets go of the others when `evictions` has grown."""
        return (self.folder / sha256).exists()

    @checked(files=checked_later, opener=function)
    def opened(self, root: Path, files: Sequence[StoredFile], opener: Callable[[list[Path]], T]) -> T:
        """`opener` of files of the store at `root`, here until it has opened or mapped them; it does nothing else.

        Another process that shares the folder may evict one all the same, which is then fetched again. As `local`.
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
        """Files that are not evicted meanwhile, and have room: all of them or none, so that no two wait for each other.

        Waits until what other threads keep leaves that room.
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
            if all(map(self.holds, mine)):  # nothing is to be fetched
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
        """Evicts what was used longest ago, until there is room for all that is kept, here already or not."""
        own = f"{TEMPORARY}{os.getpid()}-"  # what this process is fetching is counted in full, so not as it stands
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
        """(name, bytes, time of last use in ns) of what is here."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    found.append((entry.name, stat.st_size, stat.st_mtime_ns))
        return found


def _name(root: Path, file: StoredFile) -> str:
    if not re.fullmatch("[0-9a-f]{64}", file.sha256):  # it becomes the name of a file
        raise CorruptShard(f"{root / file.path}: {file.sha256!r} is no SHA-256; run `nfm pairs verify` on its store")
    return file.sha256


def default_cache() -> ShardCache:
    """The cache of this process, made when it is first asked for."""
    global _default
    with _default_lock:
        if _default is None:
            _default = ShardCache()
        return _default


_caches: weakref.WeakSet[ShardCache] = weakref.WeakSet()
_default: ShardCache | None = None
_default_lock = threading.Lock()


def _after_fork() -> None:
    """A child has no threads, so its caches begin with free locks, in folders of its own."""
    global _default_lock
    _default_lock = threading.Lock()
    for cache in _caches:
        cache._begin()


os.register_at_fork(after_in_child=_after_fork)


def _used(target: Path, size: int) -> bool:
    """Whether a file is here, whole; it is then the one used last."""
    try:
        if target.stat().st_size != size:
            return False
        now = time.time_ns()
        os.utime(target, ns=(now, now))
    except FileNotFoundError:
        return False
    return True


def _arrive(path: Path, file: StoredFile, target: Path) -> str | None:
    """Downloads a file to its name; what is wrong with what arrived, None when it is right."""
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
