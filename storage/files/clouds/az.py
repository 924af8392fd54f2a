"""Azure Blob Storage, by adlfs. A bucket is called a container there.

https://learn.microsoft.com/rest/api/storageservices/specifying-conditional-headers-for-blob-service-operations
"""

from __future__ import annotations

import asyncio
import errno
import math
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from nfm.storage.files.clouds.cloud import NoSuchBucket, Stored

EXTRA = "az"
CREDENTIALS = "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and a key, a token or a log-in of Azure's"
ENDPOINTS: tuple[str, ...] = ("AZURE_STORAGE_CONNECTION_STRING",)
CONDITIONS = ("If-None-Match", "If-Match")
PARTS: float = math.inf  # the list of the parts is put on the condition of the whole; never by itself
MOST: float = math.inf


def options(protocol: str, seconds: float) -> dict[str, Any]:
    return {"connection_timeout": round(seconds), "read_timeout": round(seconds)}


def prepare(fs: Any, seconds: float) -> None:
    policy = getattr(getattr(fs.service_client, "_config", None), "retry_policy", None)
    if policy is not None:
        policy.total_retries = 0  # Azure's client tries 4 times, in a minute


def read(fs: Any, name: str) -> Stored:
    from azure.core.exceptions import ResourceNotFoundError
    from fsspec.asyn import sync

    try:
        return sync(fs.loop, _read, fs, name)
    except ResourceNotFoundError as error:
        raise FileNotFoundError(name) from error


async def _read(fs: Any, name: str) -> Stored:
    told: dict[str, str] = {}
    async with _blob(fs, name) as blob:
        stream = await blob.download_blob(raw_response_hook=lambda answer: told.update(answer.http_response.headers))
        data = await stream.readall()
    now = parsedate_to_datetime({key.lower(): value for key, value in told.items()}["date"])
    return Stored(data, stream.properties.etag, (now - stream.properties.last_modified).total_seconds())


def put(fs: Any, name: str, data: bytes, tag: str | None) -> str | None:
    from azure.core import MatchConditions
    from azure.core.exceptions import ResourceExistsError, ResourceModifiedError, ResourceNotFoundError
    from fsspec.asyn import sync

    condition = {"overwrite": False} if tag is None else {
        "overwrite": True, "etag": tag, "match_condition": MatchConditions.IfNotModified,
    }  # fmt: skip
    try:
        return str(sync(fs.loop, _put, fs, name, data, condition)["etag"])
    except (ResourceExistsError, ResourceModifiedError):
        return None
    except ResourceNotFoundError:
        if tag is None:
            raise NoSuchBucket(name.split("/")[0]) from None
        return None


async def _put(fs: Any, name: str, data: bytes, condition: dict[str, Any]) -> Any:
    async with _blob(fs, name) as blob:
        return await blob.upload_blob(data, **condition)


def remove(fs: Any, name: str, tag: str) -> None:
    from azure.core.exceptions import ResourceModifiedError, ResourceNotFoundError
    from fsspec.asyn import sync

    try:
        sync(fs.loop, _remove, fs, name, tag)
    except (ResourceModifiedError, ResourceNotFoundError):
        return


async def _remove(fs: Any, name: str, tag: str) -> None:
    from azure.core import MatchConditions

    async with _blob(fs, name) as blob:
        await blob.delete_blob(etag=tag, match_condition=MatchConditions.IfNotModified)


def copy(fs: Any, source: str, target: str) -> None:
    """As in `Cloud`. Azure may answer before the copy is there."""
    from azure.core.exceptions import ResourceNotFoundError
    from fsspec.asyn import sync

    try:
        sync(fs.loop, _copy, fs, source, target)
    except ResourceNotFoundError as error:
        raise FileNotFoundError(source) from error


async def _copy(fs: Any, source: str, target: str) -> None:
    async with _blob(fs, source) as one, _blob(fs, target) as other:
        state = (await other.start_copy_from_url(one.url))["copy_status"]
        while state == "pending":
            await asyncio.sleep(0.2)
            state = (await other.get_blob_properties()).copy.status
        if state != "success":
            raise OSError(errno.EIO, f"the copy of {source} to {target} ended as {state!r}")


def _blob(fs: Any, name: str) -> Any:
    container, blob, _ = fs.split_path(name)
    return fs.service_client.get_blob_client(container=container, blob=blob)


def parts_are_refused(fs: Any, name: str) -> bool:
    return True


def facts(item: Mapping[str, Any]) -> tuple[float | None, str]:
    changed = item.get("last_modified")
    return (changed.timestamp() if changed is not None else None), str(item.get("etag") or "")
