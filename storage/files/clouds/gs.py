"""Google Cloud Storage, by gcsfs. The tag of a version is its generation.

https://cloud.google.com/storage/docs/request-preconditions
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from types import MethodType
from typing import Any
from urllib.parse import quote

from nfm.storage.files.clouds.cloud import NoSuchBucket, Stored

EXTRA = "gs"
CREDENTIALS = "GOOGLE_APPLICATION_CREDENTIALS, or log in with `gcloud auth application-default login`"
ENDPOINTS: tuple[str, ...] = ("STORAGE_EMULATOR_HOST",)
CONDITIONS = ("ifGenerationMatch=0", "ifGenerationMatch")
PARTS: float = 5 << 20  # from here on gcsfs uploads parts
MOST: float = 5 << 40  # of any object
_NOTHING = "0"  # the generation of what is not there


def options(protocol: str, seconds: float) -> dict[str, Any]:
    # By default gcsfs looks at every bucket by gRPC, whose threads do not survive a fork, and readers are forked.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    return {}


def prepare(fs: Any, seconds: float) -> None:
    import aiohttp

    once = getattr(type(fs)._request, "__wrapped__", None)  # gcsfs tries 6 times, in half a minute, and logs tracebacks
    if once is not None:
        fs._request = MethodType(once, fs)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    fs.requests_timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)


def read(fs: Any, name: str) -> Stored:
    """As in `Cloud`: first what is said of an object, then its bytes of that generation."""
    bucket, key, _ = fs.split_path(name)
    while True:
        headers, told = fs.call("GET", "b/{}/o/{}", bucket, key)
        said = json.loads(told)
        try:
            _, data = fs.call("GET", "b/{}/o/{}", bucket, key, alt="media", generation=said["generation"])
        except FileNotFoundError:  # replaced in between
            continue
        age = parsedate_to_datetime(headers["Date"]) - datetime.fromisoformat(said["updated"])
        return Stored(bytes(data), str(said["generation"]), max(0.0, age.total_seconds()))


def put(fs: Any, name: str, data: bytes, tag: str | None) -> str | None:
    bucket, key, _ = fs.split_path(name)
    mark = secrets.token_hex(16)
    head = f"--{mark}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps({'name': key})}\r\n"
    head += f"--{mark}\r\nContent-Type: application/octet-stream\r\n\r\n"
    try:
        made = fs.call(
            "POST",
            f"{fs._location}/upload/storage/v1/b/{quote(bucket)}/o",
            uploadType="multipart",
            ifGenerationMatch=tag or _NOTHING,
            headers={"Content-Type": f"multipart/related; boundary={mark}"},
            data=b"".join((head.encode(), data, f"\r\n--{mark}--".encode())),
            json_out=True,
        )
    except FileExistsError:  # what gcsfs makes of 412
        return None
    except FileNotFoundError:
        if tag is None:
            raise NoSuchBucket(bucket) from None
        return None
    return str(made["generation"])


def remove(fs: Any, name: str, tag: str) -> None:
    bucket, key, _ = fs.split_path(name)
    try:
        fs.call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=tag)
    except FileExistsError:
        return


def copy(fs: Any, source: str, target: str) -> None:
    fs.cp_file(source, target)


def parts_are_refused(fs: Any, name: str) -> bool:
    try:
        fs.pipe_file(name, b"second", mode="create", chunksize=len(b"second"))
    except FileExistsError:
        return True
    return False


def facts(item: Mapping[str, Any]) -> tuple[float | None, str]:
    changed = item.get("updated")
    return (datetime.fromisoformat(changed).timestamp() if changed else None), str(item.get("generation", ""))
