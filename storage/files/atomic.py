"""Files that are either absent or complete, on local disks and object stores, and JSON that carries its own digest.

Every function takes a local path or a URL of `as_path`. Errors are StorageErrors that name the file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nfm.storage.errors import CorruptShard, MissingShard, StorageError, cannot_write
from nfm.storage.files import clouds, remote
from nfm.storage.files.copies.large import put_new
from nfm.storage.files.digested_json import RESTORE
from nfm.storage.files.digested_json import canonical_json as canonical_json
from nfm.storage.files.digested_json import checked as checked
from nfm.storage.files.digested_json import digest as digest
from nfm.storage.files.digested_json import digested_text as digested_text
from nfm.storage.files.durable import HashingFile, sync_folder
from nfm.storage.files.paths import TEMPORARY, as_path, is_remote, remove, size_of
from nfm.storage.files.small_files import MOST_BYTES, MOST_INDEX_BYTES, plain, read_bytes

_CHUNK = 4 << 20
_TRIES = 3  # times to read a remote JSON file before it counts as damaged


def content_digest(digests: Iterable[str]) -> str:
    """The digest of an artifact's content: SHA-256 over its payload digests, one a line, in order."""
    return digest("\n".join(digests).encode())


def hash_file(path: str | Path) -> tuple[str, int]:
    """SHA-256 (hex) and size in bytes of a file. Raises StorageError when it cannot be read."""
    sha, size = hashlib.sha256(), 0
    try:
        for chunk in _chunks(as_path(path)):
            sha.update(chunk)
            size += len(chunk)
    except OSError as error:
        raise StorageError(f"{path}: cannot read ({error.strerror or error}); restore it or run `nfm audit`") from error
    return sha.hexdigest(), size


def standing_sha256(path: str | Path) -> str:
    """SHA-256 of a local file, read once in each process unless the file changes. Raises OSError, StorageError."""
    found = Path(path).stat()
    return _standing(Path(path).resolve(), found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _standing(path: Path, size: int, modified_ns: int) -> str:
    return hash_file(path)[0]


def _chunks(path: Path) -> Iterator[bytes]:
    if is_remote(path):
        size = remote.attempt(path, "look at", lambda fs, name: fs.info(name))["size"]
        yield from remote.read_pieces(path, size)
        return
    with plain(path) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def read_checked(path: Path, sha256: str, most: int = MOST_INDEX_BYTES) -> bytes:
    """The contents of a remote file of at most `most` bytes. It is read again if its SHA-256 is not the given one.

    Raises FileNotFoundError and CorruptShard.
    """
    for _ in range(_TRIES):
        data = read_bytes(path, most)
        if digest(data) == sha256:
            return data
        time.sleep(0.1)
    raise CorruptShard(f"{path}: SHA-256 {digest(data)[:12]}, {sha256[:12]} was committed; {RESTORE}")


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path` and replaces what is there. Readers see the old file or the new one, never a part."""
    where = as_path(path)
    if is_remote(where):
        remote.attempt(where, "write", lambda fs, name: fs.pipe_file(name, bytes(data)))
        return
    with HashingFile(where) as file:
        file.write(data)


def create_bytes(path: str | Path, data: bytes) -> bool:
    """Writes `data` to `path` only if nothing is there. Returns True if the file at `path` is the caller's.

    Of many local writers exactly one gets True. An object store can answer "exists" to a put that succeeded, if the
    first answer was lost. There, every writer of the same bytes gets True, so put something unique in them.
    """
    where = as_path(path)
    if is_remote(where):
        return remote.create(
            where,
            lambda fs, name: put_new(fs, name, bytes(data)),
            lambda: read_bytes(where, max(MOST_BYTES, len(data))) == data,
        )
    if os.path.lexists(where):
        return False
    file = HashingFile(where, replace=False)
    with file:
        file.write(data)
    return file.published


def place(source: Path, target: Path, size: int | None = None, keep: bool = False) -> None:
    """Moves a durable file of a store to its final name.

    On a local disk this is a hard link, on an object store a copy within it. With `keep`, the old name stays too.
    It may be killed and called again at any point: if `source` is gone, `target` must exist, with `size` bytes if
    given. Raises MissingShard, CorruptShard, or StorageError if another file has that name.
    """
    source, target = as_path(source), as_path(target)
    try:
        _place(source, target, size, keep)
    except FileNotFoundError as error:
        if size_of(source) is not None or size_of(target) is None or size not in (None, size_of(target)):
            raise MissingShard(f"{source}: vanished while it was placed; who removes files of the store?") from error
        # Another process sealed the same store and removed the old name first.


def _place(source: Path, target: Path, size: int | None, keep: bool) -> None:
    have, found = size_of(source), size_of(target)
    if have is None and found is None:
        raise MissingShard(f"{source}: the file is missing; restore it, or run `nfm repair` on its store")
    if have is not None and found is None:
        _second_name(source, target)
        found = size_of(target)
    elif have is not None and (found != have or not _same(source, target)):
        raise StorageError(
            f"{target}: damaged, or of another run, for {source} differs; move it away, and run the same command again"
        )
    expected = size if size is not None else have
    if expected is not None and found != expected:
        raise CorruptShard(f"{target}: {found} bytes, {expected} were committed; run `nfm repair` on its store")
    if have is not None and not is_remote(target):
        sync_folder(target.parent)  # the new name is durable before the old one is removed
    if not keep:
        remove(source)


def _second_name(source: Path, target: Path) -> None:
    if is_remote(target):
        copied = getattr(target, "path")  # noqa: B009 not an attribute of pathlib's paths
        remote.attempt(source, "copy", lambda fs, name: clouds.copy(fs, name, copied))
        return
    try:
        fresh = [folder for folder in target.parents if not folder.is_dir()]
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in fresh:
            sync_folder(folder.parent)
        os.link(source, target)
    except FileExistsError:
        if not _same(source, target):
            raise
    except FileNotFoundError:
        raise
    except OSError as error:
        raise cannot_write(target, error) from error


def _same(one: Path, other: Path) -> bool:
    return (not is_remote(one) and os.path.samefile(one, other)) or hash_file(one) == hash_file(other)


def write_json(path: str | Path, body: Mapping[str, Any]) -> None:
    """Writes `body` and its `digest`, and replaces what is there."""
    write_bytes(path, digested_text(path, body))


def create_json(path: str | Path, body: Mapping[str, Any]) -> bool:
    """Writes `body` and its `digest` if nothing is there. Returns False if something is."""
    return create_bytes(path, digested_text(path, body))


def read_json(path: str | Path, root: Path | None = None) -> dict[str, Any]:
    """The JSON object in `path`. Its bytes must be exactly what `create_json` writes for these contents.

    The `digest` protects the contents. As there is only one way to write them, every byte of the file is checked. No
    link may lead out of `root`, by default the file's folder. Raises StorageError.
    """
    where = as_path(path)
    data = _read(where, root)
    for _ in range(_TRIES - 1 if is_remote(where) else 0):  # the file may be complete although a download was damaged
        try:
            return checked(where, data)
        except StorageError:
            time.sleep(0.1)
            data = _read(where, root)
    return checked(where, data)


def _read(path: Path, root: Path | None) -> bytes:
    try:
        return read_bytes(path, root=root)
    except FileNotFoundError as error:
        raise StorageError(f"{path}: no such file; was the stage that writes it run to its end?") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot read ({error.strerror}); check its permissions") from error


def is_temporary(path: str | Path) -> bool:
    """Whether this is one of our unpublished temporary files, which every reader ignores."""
    return Path(path).name.startswith(TEMPORARY)


def clear_temporaries(folder: str | Path, idle_seconds: float = 3600.0) -> list[Path]:
    """Removes the temporary files under `folder` that were not written to for `idle_seconds`; returns them."""
    removed = []
    for path in Path(folder).rglob(TEMPORARY + "*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and time.time() - path.stat().st_mtime >= idle_seconds:
                path.unlink()
                removed.append(path)
    return removed
