"""Amazon's S3 and what speaks its protocol, by s3fs."""

from __future__ import annotations

from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from nfm.storage.files.clouds import failures
from nfm.storage.files.clouds.cloud import Stored

EXTRA = "s3"
CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role"
ENDPOINTS: tuple[str, ...] = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
CONDITIONS = ("If-None-Match", "If-Match")
PARTS: float = 100 << 20  # from here on s3fs uploads parts
MOST: float = 5 << 30  # by S3's rules
CONNECTIONS = 32  # at the same time; botocore's 10 make a listing of a thousand files wait for each other

_REFUSED = 412
_bare: set[str] = set()  # buckets of servers, such as Ceph's, that know a tag only without its quotation marks


def options(protocol: str, seconds: float) -> dict[str, Any]:
    from fsspec.config import conf

    # botocore's own retries would multiply with those of `remote.attempt`: minutes if an endpoint is down.
    own = conf.get(protocol, {}).get("config_kwargs")
    # Its timeouts of 60 s would be longer than a short patience.
    config = {
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "connect_timeout": seconds,
        "read_timeout": seconds,
        "max_pool_connections": CONNECTIONS,
    }
    return {"config_kwargs": own or config}


def prepare(fs: Any, seconds: float) -> None:
    # s3fs tries 5 times, and a read 5 times 5: minutes if a server does not answer. One retry is kept, because s3fs
    # repeats only the failed part of a large upload.
    fs.retries = min(fs.retries, 2)


def read(fs: Any, name: str) -> Stored:
    from fsspec.asyn import sync

    return sync(fs.loop, _read, fs, name)


async def _read(fs: Any, name: str) -> Stored:
    bucket, key, _ = fs.split_path(name)
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return Stored(await answer["Body"].read(), answer["ETag"], (now - answer["LastModified"]).total_seconds())


def put(fs: Any, name: str, data: bytes, tag: str | None) -> str | None:
    if tag is None:
        return _put(fs, name, data, IfNoneMatch="*")
    bucket, bare = name.split("/")[0], tag.strip('"')
    if bucket not in _bare:
        if (new := _put(fs, name, data, IfMatch=tag)) is not None:
            return new
        if bare == tag or _tag_of(fs, name) != tag:
            return None
    if (new := _put(fs, name, data, IfMatch=bare)) is not None:
        _bare.add(bucket)
    return new


def _tag_of(fs: Any, name: str) -> str:
    try:
        return read(fs, name).tag
    except FileNotFoundError:
        return ""


def _put(fs: Any, name: str, data: bytes, **condition: str) -> str | None:
    bucket, key, _ = fs.split_path(name)
    try:
        return str(fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)["ETag"])
    except OSError as error:
        gone = isinstance(error, FileNotFoundError) and not failures.no_bucket(error)
        if gone or isinstance(error, FileExistsError) or failures.status_of(error) == _REFUSED:
            return None
        raise


def remove(fs: Any, name: str, tag: str) -> None:
    """As in `Cloud`. Servers that know no such condition remove what is there."""
    bucket, key, _ = fs.split_path(name)
    try:
        fs.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=tag)
    except OSError as error:
        if failures.status_of(error) != _REFUSED:
            raise


def copy(fs: Any, source: str, target: str) -> None:
    fs.cp_file(source, target)


def parts_are_refused(fs: Any, name: str) -> bool:
    """As in `Cloud`. Some servers, such as Ceph's, do not look at the condition where the parts are put together."""
    bucket, key, _ = fs.split_path(name)
    where = {"Bucket": bucket, "Key": key}
    upload = {**where, "UploadId": fs.call_s3("create_multipart_upload", **where)["UploadId"]}
    tag = fs.call_s3("upload_part", **upload, PartNumber=1, Body=b"second")["ETag"]
    parts = {"Parts": [{"ETag": tag, "PartNumber": 1}]}
    try:
        fs.call_s3("complete_multipart_upload", **upload, MultipartUpload=parts, IfNoneMatch="*")
    except OSError as error:
        if failures.may_pass(error):
            raise
        fs.call_s3("abort_multipart_upload", **upload)
        return isinstance(error, FileExistsError) or failures.status_of(error) == _REFUSED
    return False


def facts(item: Mapping[str, Any]) -> tuple[float | None, str]:
    changed = item.get("LastModified")
    return (changed.timestamp() if changed is not None else None), str(item.get("ETag", ""))
