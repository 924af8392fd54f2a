"""Requests to an object store. They are tried again while the error may be temporary, and then explained.

fsspec's file systems pass on many errors of their libraries, which are optional here. So errors are recognised by HTTP
status, error code and class name.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from nfm.storage.errors import CorruptShard, StorageError
from nfm.storage.errors.masked import masked
from nfm.storage.files.parallel import parallel
from nfm.storage.files.places import patience

T = TypeVar("T")
_log = logging.getLogger("nfm.storage")
_PIECE = 8 << 20  # bytes of one ranged request
_AHEAD = 4  # ranged requests of one file at a time
_ANSWERS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)

_PASSING_STATUS = (408, 409, 425, 429)  # and all from 500 on
_PASSING_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "SlowDown", "XAmzContentSHA256Mismatch"}
_PASSING_ERRNO = {errno.EIO, errno.EBUSY, errno.EPIPE, errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH}
_PASSING_NAMES = {
    "HTTPClientError",  # botocore: connection reset or timed out
    "ConnectionError",  # botocore: connection refused; requests
    "ClientConnectionError",  # aiohttp
    "ClientPayloadError",
    "IncompleteRead",  # urllib3, http.client
    "ResponseParserError",
    "RequestException",  # requests, under gcsfs
}
_DAMAGED_NAMES = {"ChecksumError", "FlexibleChecksumError"}  # botocore: the body does not match its checksum
_DAMAGED_TRIES = 3
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "ProfileNotFound",
    "DefaultCredentialsError",
}
_NO_BUCKET = {"NoSuchBucket", "InvalidBucketName"}


def file_system(path: Path) -> Any:
    """The fsspec file system of a URL. It is looked up each time, because a forked child must have its own."""
    import fsspec

    where: Any = path
    try:
        found = fsspec.filesystem(where.protocol, **where.storage_options)
    except ImportError as error:
        raise StorageError(f"{path}: {error}; without that package {where.protocol}:// cannot be used") from error
    if where.protocol in ("s3", "s3a"):
        # s3fs tries 5 times, and a read 5 times 5: minutes if a server does not answer. `attempt` tries again instead.
        # s3fs keeps one retry, because it repeats only the failed part of a large upload.
        found.retries = min(found.retries, 2)
    _known[f"{where.protocol} {where.storage_options}"] = found
    return found


_known: dict[str, Any] = {}
_inherited: list[Any] = []


def _keep_inherited() -> None:
    """In a forked child: keeps the parent's file systems alive.

    If they were collected, they would close connections that the parent waits on, and the parent would hang until its
    timeout.
    """
    _inherited.append(dict(_known))
    _known.clear()


os.register_at_fork(after_in_child=_keep_inherited)


def attempt(path: Path, doing: str, action: Callable[[Any, str], T]) -> T:
    """Calls `action(file system, its name for path)`, and again with growing pauses while the error may be temporary.

    FileNotFoundError, FileExistsError and the like are answers, and are raised unchanged. Anything else becomes a
    StorageError that names the URL, the operation (`doing`: "read", "write") and the remedy.
    """
    began, pause, limit, warned, damaged = time.monotonic(), 0.1, patience(), False, 0
    while True:
        try:
            return action(file_system(path), getattr(path, "path"))  # noqa: B009 not an attribute of pathlib's paths
        except StorageError:
            raise
        except Exception as raised:
            error = _behind(raised)
            if isinstance(error, _ANSWERS) and _code(error) not in _NO_BUCKET:
                raise
            left = limit - (time.monotonic() - began)
            damaged += bool(_names(error) & _DAMAGED_NAMES)
            if not may_pass(error) or left <= 0 or damaged == _DAMAGED_TRIES:
                raise explained(path, doing, error) from error
            if not warned and pause > 0.5:
                warned = True
                _log.warning("%s: cannot %s yet (%s); trying again for %.0f s", path, doing, _text(error), left)
            time.sleep(min(left, pause * random.uniform(0.5, 1.0)))
            pause = min(2 * pause, 10.0)


def create(path: Path, put: Callable[[Any, str], Any], is_ours: Callable[[], bool]) -> bool:
    """Creates an object if there is none, by a conditional put. Returns whether the stored object is ours.

    A put that is repeated after a lost answer also gets "it exists already", whether we or the library repeated it. If
    all answers are lost, the result is unknown. In both cases `is_ours` reads back what is stored.
    """
    try:
        attempt(path, "write", put)
        return True
    except FileExistsError:
        return is_ours()
    except StorageError as gave_up:
        try:
            return is_ours()
        except (StorageError, *_ANSWERS):
            raise gave_up from gave_up.__cause__


def read_range(path: Path, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes start to stop of an object; fewer if it ends there, or if an answer is cut short."""

    def read(fs: Any, name: str) -> bytes:
        try:
            return bytes(fs.cat_file(name, start=start, end=stop))
        except Exception as error:
            if status_of(error) == 416:  # the object ends before `start`
                return b""
            raise

    return attempt(path, "read", read)


def read_pieces(path: Path, size: int) -> Iterator[bytes]:
    """The first `size` bytes of an object in order, by a few large ranged requests at a time.

    A piece may be short, as in `read_range`: compare the sum.
    """
    if 0 < size <= _PIECE:
        yield read_range(path, 0, size)
        return

    def read(start: int) -> bytes:
        return read_range(path, start, min(start + _PIECE, size))

    yield from parallel(read, range(0, size, _PIECE), _AHEAD, ahead=_AHEAD)


def _behind(error: Exception) -> Exception:
    """What happened: fsspec's HTTP tells any failure of a look, a refused connection too, as "not found"."""
    behind = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(behind, Exception):
        return error
    told = status_of(behind) not in (None, 404, 410) or may_pass(behind)
    return behind if told else error


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    status = status_of(error)
    if status is not None:
        return (status >= 500 and status != 501) or status in _PASSING_STATUS or _code(error) in _PASSING_CODES
    if isinstance(error, PermissionError) or _names(error) & _NO_CREDENTIALS:
        return False
    passing = isinstance(error, TimeoutError) or bool(_names(error) & (_PASSING_NAMES | _DAMAGED_NAMES))
    return passing or (isinstance(error, OSError) and error.errno in _PASSING_ERRNO | {getattr(errno, "EREMOTEIO", 0)})


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error carries; None if it has none."""
    for value in (
        _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode"),
        getattr(error, "code", None),  # gcsfs
        getattr(error, "status", None),  # aiohttp
    ):
        if isinstance(value, int) and 100 <= value < 600:
            return value
    return None


def explained(path: Path, doing: str, error: BaseException) -> StorageError:
    """The error for the user: which URL, what is wrong, what to do."""
    if _names(error) & _DAMAGED_NAMES:
        return CorruptShard(f"{path}: cannot {doing} ({_text(error)}), {_DAMAGED_TRIES} times; restore it from a copy")
    return StorageError(f"{path}: cannot {doing} ({_text(error)}); {_remedy(path, error)}")


def _remedy(path: Path, error: BaseException) -> str:
    if _names(error) & _NO_CREDENTIALS:
        return (
            "no usable credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role "
            "(for gs:// GOOGLE_APPLICATION_CREDENTIALS)"
        )
    if _code(error) in _NO_BUCKET:
        return "there is no such bucket: create it, or correct the URL"
    if isinstance(error, PermissionError) or status_of(error) in (401, 403):
        return (
            "access is denied: check the credentials (key, secret, clock) and the bucket's policy; reading needs the "
            "right to get and list objects, writing to put and delete them"
        )
    if status_of(error) is not None and may_pass(error):
        return f"the object store kept failing for {patience():.0f} s (NFM_PATIENCE): run the same command again later"
    if may_pass(error):
        endpoint = masked(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
        named = f" (AWS_ENDPOINT_URL is {endpoint})" if endpoint and str(path).startswith("s3") else ""
        return f"no answer within {patience():.0f} s (NFM_PATIENCE): check the network and the endpoint{named}"
    return "check the URL and the object store's settings"


def _response(error: BaseException) -> dict[str, Any]:
    """The parsed answer of botocore, if an error or its cause has one."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _text(error: BaseException) -> str:
    text = masked(" ".join(str(error).split()))  # hide secrets before the text is cut, which could split one
    return (text if len(text) <= 300 else text[:297] + "...") or type(error).__name__
