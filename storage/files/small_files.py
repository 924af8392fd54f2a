"""The only way to read small files: recipes, manifests, commits, locks, notes, logs, lists of shards, states.

If somebody else made the folder, anything may be there under such a name: a pipe that nobody writes to, a device
without an end, a link to a file elsewhere, more bytes than fit into memory. So only a plain file is read, inside its
folder and up to a given size. For anything else the message says what is there.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from nfm.storage.errors import StorageError
from nfm.storage.files import remote
from nfm.storage.files.paths import inside, is_remote, size_of

MOST_BYTES = 64 << 20  # of metadata: a manifest that lists 100,000 shards itself has half of it
MOST_INDEX_BYTES = 1 << 30  # of an index part, or of the list of two million shards
MOST_STATE_BYTES = 64 << 30  # of a model's weights, or of a full training state


def read_bytes(path: Path, most: int = MOST_BYTES, root: Path | None = None) -> bytes:
    """The contents of a file of at most `most` bytes. No link may lead out of `root`, by default the file's folder.

    Raises FileNotFoundError, OSError (local) or StorageError.
    """
    if is_remote(path):
        # One request; a plain read of s3fs would ask for the size first.
        data = remote.read_range(path, 0, most + 1)
        _check_size(path, len(data), most)
        return data
    with opened(path, root) as file:
        size = os.fstat(file.fileno()).st_size
        _check_size(path, size, most)
        return file.read(size + 1)  # not to the end: another process may be writing to it


def read_tail(path: Path, most: int, root: Path | None = None) -> bytes:
    """The last `most` bytes of a file that grows, such as a log; all of it if it is shorter. As `read_bytes`."""
    if is_remote(path):
        size = size_of(path)
        if size is None:
            raise FileNotFoundError(f"{path}: no such file")
        return remote.read_range(path, max(0, size - most), size) if size else b""
    with opened(path, root) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        return file.read(most)


def opened(path: Path, root: Path | None = None) -> BinaryIO:
    """A plain local file, opened for reading. No link may lead out of `root`, by default the file's folder.

    Raises FileNotFoundError, OSError or StorageError.
    """
    within = path.parent if root is None else root
    return plain(inside(within, str(path.relative_to(within))))


def plain(path: Path) -> BinaryIO:
    """A plain local file, opened for reading. Links to it are followed.

    Raises FileNotFoundError or OSError. Raises StorageError for pipes and devices: reading one may never end.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise StorageError(f"{path}: {what}, where a file was expected; move it away and restore the file from a copy")
    return os.fdopen(handle, "rb")


def _check_size(path: Path, size: int, most: int) -> None:
    if size > most:
        many = f"{size:,} bytes" if not is_remote(path) else "more bytes"
        raise StorageError(f"{path}: {many}, where a file of its kind has at most {most:,}; restore it from a copy")
