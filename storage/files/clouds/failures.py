"""What the error of a client of an object store says: its HTTP status, and whether the same request may yet succeed.

The clients are optional here. So their errors are recognised by HTTP status, error code and class name.
"""

from __future__ import annotations

import errno
from typing import Any

ANSWERS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)

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
    "TransportError",  # google-auth
    "ServiceRequestError",  # azure-core: no connection; no answer; half an answer
    "ServiceResponseError",
    "IncompleteReadError",
}
_DAMAGED_NAMES = {"ChecksumError", "FlexibleChecksumError"}  # botocore: the body does not match its checksum
_GARBLED_NAMES = {"JSONDecodeError"}  # gcsfs: half of what a server says of an object, or a page of another server
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "CredentialUnavailableError",  # azure-identity
}
_MISSTATED = {
    "EndpointProviderError",  # botocore
    "ParamValidationError",
    "InvalidURL",  # aiohttp, requests
    "AzureSigningError",  # azure-storage-blob: no key
}
_NO_BUCKET = {"NoSuchBucket", "InvalidBucketName", "ContainerNotFound", "InvalidResourceName"}


def behind(error: Exception) -> Exception:
    """What happened: fsspec's HTTP tells any failure of a look, a refused connection too, as "not found"."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    told = status_of(cause) not in (None, 404, 410) or may_pass(cause)
    return cause if told else error


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    status = status_of(error)
    if status is not None:
        return (status >= 500 and status != 501) or status in _PASSING_STATUS or code_of(error) in _PASSING_CODES
    if isinstance(error, PermissionError) or no_credentials(error):
        return False
    passing = isinstance(error, TimeoutError) or bool(_names(error) & _PASSING_NAMES)
    passing = passing or damaged(error) or garbled(error)
    return passing or (isinstance(error, OSError) and error.errno in _PASSING_ERRNO | {getattr(errno, "EREMOTEIO", 0)})


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error carries; None if it has none."""
    for value in (
        _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode"),
        getattr(error, "code", None),  # gcsfs
        getattr(error, "status", None),  # aiohttp
        getattr(error, "status_code", None),  # azure-core
    ):
        if isinstance(value, int) and 100 <= value < 600:
            return value
    return None


def damaged(error: BaseException) -> bool:
    """Whether what arrived does not match its checksum."""
    return bool(_names(error) & _DAMAGED_NAMES)


def garbled(error: BaseException) -> bool:
    """Whether the answer cannot be read: it was cut, or there is no such server."""
    return bool(_names(error) & _GARBLED_NAMES)


def no_credentials(error: BaseException) -> bool:
    """Whether no credentials were found."""
    unnamed = isinstance(error, ValueError) and "Must provide either a connection_string" in str(error)  # adlfs
    return unnamed or bool(_names(error) & _NO_CREDENTIALS)


def no_bucket(error: BaseException) -> bool:
    """Whether there is no such bucket."""
    return bool(({code_of(error)} | _names(error)) & _NO_BUCKET)


def misstated(error: BaseException) -> bool:
    """Whether the client made no request of what the user wrote: the URL, the endpoint, a connection string."""
    return not no_credentials(error) and (type(error) is ValueError or bool(_names(error) & _MISSTATED))


def denied(error: BaseException) -> bool:
    """Whether the credentials do not suffice."""
    told = isinstance(error, OSError) and str(error).startswith("Forbidden: ")  # what gcsfs makes of 403
    return told or isinstance(error, PermissionError) or status_of(error) in (401, 403)


def code_of(error: BaseException) -> str:
    """The error code of S3 or Azure; empty if there is none."""
    code = getattr(error, "error_code", None)  # azure-storage-blob; an enum
    return str(_response(error).get("Error", {}).get("Code", "") or getattr(code, "value", code) or "")


def _response(error: BaseException) -> dict[str, Any]:
    """The parsed answer of botocore, if an error or its cause has one."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}
