"""Objects that are created only if there is none, also large ones, which s3fs uploads in parts.

Then the condition stands in the request that puts the parts together. Some servers, such as Ceph's gateway, do not look
at it there, and overwrite. To these a large file is put in one request.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from nfm.storage.errors import StorageError
from nfm.storage.files import remote

PARTS = 100 << 20  # bytes from which on s3fs uploads parts
MOST = 5 << 30  # bytes of one request, by S3's rules
_keeps: dict[str, bool] = {}  # by bucket, what was found out


def put_new(fs: Any, name: str, source: str | bytes) -> None:
    """Puts bytes, or the file of a local path. Raises FileExistsError if there is an object, for `remote.create`."""
    size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
    if size >= PARTS and hasattr(fs, "call_s3") and not _keeps_of_parts(fs, name):
        _put_whole(fs, name, source, size)
    elif isinstance(source, bytes):
        fs.pipe_file(name, source, mode="create")
    else:
        fs.put_file(source, name, mode="create")


def _put_whole(fs: Any, name: str, source: str | bytes, size: int) -> None:
    if size > MOST:
        raise StorageError(
            f"{name}: {size:,} bytes, and this object store keeps to If-None-Match only for what is put in one "
            f"request, of {MOST:,} bytes at most; use another store, or smaller shards"
        )
    bucket, key, _ = fs.split_path(name)
    body = source if isinstance(source, bytes) else Path(source).read_bytes()
    fs.call_s3("put_object", Bucket=bucket, Key=key, Body=body, IfNoneMatch="*")


def _keeps_of_parts(fs: Any, name: str) -> bool:
    """Whether the server leaves an object alone that is uploaded again in parts with If-None-Match. Asked once."""
    bucket, key, _ = fs.split_path(name)
    if bucket not in _keeps:
        where = {"Bucket": bucket, "Key": f"{key}.conditions-{secrets.token_hex(8)}"}
        fs.call_s3("put_object", **where, Body=b"first")
        try:
            _keeps[bucket] = _refused(fs, where)
        finally:
            fs.call_s3("delete_object", **where)
    return _keeps[bucket]


def _refused(fs: Any, where: dict[str, str]) -> bool:
    upload = {**where, "UploadId": fs.call_s3("create_multipart_upload", **where)["UploadId"]}
    tag = fs.call_s3("upload_part", **upload, PartNumber=1, Body=b"second")["ETag"]
    parts = {"Parts": [{"ETag": tag, "PartNumber": 1}]}
    try:
        fs.call_s3("complete_multipart_upload", **upload, MultipartUpload=parts, IfNoneMatch="*")
    except OSError as error:
        if remote.may_pass(error):
            raise
        fs.call_s3("abort_multipart_upload", **upload)
        return isinstance(error, FileExistsError) or remote.status_of(error) == 412
    return False
