"""Objects that are written on a condition, also large ones, which clients upload in parts.

Then the condition stands in the request that begins the upload, or in the one that puts the parts together. Some
servers do not look at it there, and overwrite. To these a large file is put in one request.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

from nfm.storage.errors import StorageError
from nfm.storage.files import clouds
from nfm.storage.files.clouds.cloud import Cloud

_WHOLE = 100 << 20  # bytes of a file that is read into memory to be put over another one
_keeps: dict[str, bool] = {}  # by bucket, what was found out


def put_new(fs: Any, name: str, source: str | bytes) -> None:
    """Puts bytes, or the file of a local path. Raises FileExistsError if there is an object, for `remote.create`."""
    cloud, size = clouds.of(fs), len(source) if isinstance(source, bytes) else os.path.getsize(source)
    if cloud is not None and size >= cloud.PARTS and not _keeps_of_parts(cloud, fs, name):
        _put_whole(cloud, fs, name, source, size)
    elif isinstance(source, bytes):
        fs.pipe_file(name, source, mode="create")
    else:
        fs.put_file(source, name, mode="create")


def put_over(cloud: Cloud, fs: Any, name: str, source: str, tag: str) -> None:
    """Puts the file of a local path over the version of `tag` of an object, or does nothing if there is another one.

    A large file cannot be put over one in parts. So that version is removed, for `put_new` to follow. Servers that do
    not look at the condition of parts need not look at that of a removal: Ceph's does neither.
    """
    size = os.path.getsize(source)
    if size < min(cloud.PARTS, _WHOLE) or not _keeps_of_parts(cloud, fs, name):
        _check_size(cloud, name, size)
        cloud.put(fs, name, Path(source).read_bytes(), tag)
    else:
        with contextlib.suppress(FileNotFoundError):
            cloud.remove(fs, name, tag)


def _put_whole(cloud: Cloud, fs: Any, name: str, source: str | bytes, size: int) -> None:
    _check_size(cloud, name, size)
    body = source if isinstance(source, bytes) else Path(source).read_bytes()
    if cloud.put(fs, name, body, None) is None:
        raise FileExistsError(name)


def _check_size(cloud: Cloud, name: str, size: int) -> None:
    if size > cloud.MOST:
        raise StorageError(
            f"{name}: {size:,} bytes, and this object store creates an object only if there is none when it is put in "
            f"one request, of {cloud.MOST:,} bytes at most; use another store, or smaller shards"
        )


def _keeps_of_parts(cloud: Cloud, fs: Any, name: str) -> bool:
    """Whether the server leaves an object alone that is uploaded again in parts, if there is none. Asked once."""
    bucket = name.split("/")[0]
    if bucket not in _keeps:
        asked = f"{name}.conditions-{secrets.token_hex(8)}"
        fs.pipe_file(asked, b"first")
        try:
            _keeps[bucket] = cloud.parts_are_refused(fs, asked)
        finally:
            fs.rm_file(asked)
    return _keeps[bucket]
