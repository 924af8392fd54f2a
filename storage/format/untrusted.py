"""Checks values that were read from a file. Whatever JSON value comes in, only StorageError is raised."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from nfm.storage.errors import StorageError

_SHOWN = 60  # longest shown part of a wrong value in a message
_HEX = re.compile(r"[0-9a-f]{64}")
PLAIN = r"[^\x00-\x1f]*"
Value = TypeVar("Value")


def json_value(written: str | bytes) -> Any:
    """The value in JSON that another program wrote.

    Raises ValueError for what is no JSON, for a key that is twice in an object, and for nesting that is too deep.
    """
    try:
        return json.loads(written, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is there twice")
        found[key] = value
    return found


def integer(where: str, value: Any, low: int = 0, high: int = 2**63 - 1) -> int:
    """A whole number from `low` to `high`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise _wrong(where, value, "a whole number") from None
    if isinstance(value, bool) or not low <= number <= high:
        raise _wrong(where, value, f"a whole number from {low} to {high}")
    return number


def real(where: str, value: Any) -> float:
    """A finite number."""
    try:
        number = float(value) if not isinstance(value, str | bytes | bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _wrong(where, value, "a finite number")
    return number


def text(where: str, value: Any, pattern: str = PLAIN, most: int = 1000) -> str:
    """Text of at most `most` characters that matches `pattern`."""
    if not isinstance(value, str) or len(value) > most or re.fullmatch(pattern, value) is None:
        kind = (
            "text without tabs, line ends and other control characters" if pattern == PLAIN else f"text like {pattern}"
        )
        raise _wrong(where, value, f"{kind}, at most {most} characters")
    return value


def truth(where: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise _wrong(where, value, "true or false")
    return value


def sha256(where: str, value: Any) -> str:
    """A SHA-256 digest as 64 hex digits."""
    if not isinstance(value, str) or _HEX.fullmatch(value) is None:
        raise _wrong(where, value, "a SHA-256 digest of 64 hex digits")
    return value


def one_of(where: str, value: Any, choices: Sequence[str] | Mapping[str, Any]) -> str:
    """One of the names in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise StorageError(f"{where} {shown(value)} is none of {', '.join(choices)}")
    return value


def sequence(where: str, value: Any, most: int) -> Sequence[Any]:
    """A list of at most `most` items."""
    if not isinstance(value, list | tuple) or len(value) > most:
        raise _wrong(where, value, f"a list of at most {most} items")
    return value


def mapping(where: str, value: Any) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, Mapping):
        raise _wrong(where, value, "an object with keys")
    return value


def shown(value: Any) -> str:
    """A value as short text for a message."""
    if isinstance(value, list | tuple | Mapping):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return f"an integer of {value.bit_length()} bits"
    whole = repr(value)
    return whole if len(whole) <= _SHOWN else f"{whole[:_SHOWN]}…"


def _wrong(where: str, value: Any, expected: str) -> StorageError:
    return StorageError(f"{where} = {shown(value)}, it must be {expected}")
