"""JSON with a digest of its own contents, written in the only allowed form of these contents."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nfm.storage.errors import StorageError

RESTORE = "restore it from a copy, or set it aside and run the stage again"


def canonical_json(body: Any) -> bytes:
    """The only allowed JSON text of `body`: sorted keys, no spaces, UTF-8.

    Raises StorageError for NaN, infinities and keys that are not strings, and names their place.
    """
    return json.dumps(
        _plain(body, "body"), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest(data: bytes) -> str:
    """SHA-256 as hex."""
    return hashlib.sha256(data).hexdigest()


def digested_text(path: str | Path, body: Mapping[str, Any]) -> bytes:
    """The text of `body` with its digest. Raises StorageError that names the file and a value that JSON cannot hold."""
    plain = _plain({key: value for key, value in body.items() if key != "digest"}, str(path))
    plain["digest"] = _digest_of(plain, str(path))
    return _rendered(plain)


def _rendered(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _digest_of(body: Mapping[str, Any], where: str) -> str:
    rest = {key: value for key, value in body.items() if key != "digest"}
    return digest(canonical_json(_plain(rest, where)))


def _plain(value: Any, where: str) -> Any:
    """`value` in JSON's own types, so that it reads back with the same digest."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _whole(value, where)
    if isinstance(value, np.generic):
        return _plain(value.item(), where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise StorageError(f"{where}: {value} is no JSON number; store null, or see where it came from")
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise StorageError(f"{where}: the key {key!r} is no string; write it as one")
        return {_whole(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise StorageError(f"{where}: a {type(value).__name__} has no JSON form; convert it first")


def _whole(text: str, where: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise StorageError(
                f"{where}: {text[:40]!r} has half a character, no UTF-8 holds it; write it anew"
            ) from error
    return text


def checked(path: Path, data: bytes) -> dict[str, Any]:
    """The object in the text of a file.

    Its digest must be right, and the text must be exactly what `digested_text` makes of it. Raises StorageError.
    """
    try:
        return _proven(path, data)
    except RecursionError as error:
        raise StorageError(f"{path}: nested too deeply to be one of ours; {RESTORE}") from error


def _proven(path: Path, data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data.decode())  # of bytes, a guess at their encoding would be told
    except ValueError as error:
        raise StorageError(f"{path}: not valid JSON ({error}); {RESTORE}") from error
    if not isinstance(body, dict):
        raise StorageError(f"{path}: holds a JSON {type(body).__name__}, an object was expected; {RESTORE}")
    stated = body.get("digest")
    if stated is None:
        raise StorageError(f"{path}: has no digest of itself, so nothing vouches for it; {RESTORE}")
    if stated != _digest_of(body, str(path)):
        raise StorageError(f"{path}: its contents do not match its digest {str(stated)[:12]}; {RESTORE}")
    if data != _rendered(body):
        raise StorageError(f"{path}: its text is not, byte for byte, what was written under its digest; {RESTORE}")
    return body
