"""The errors of a store, one class for each cause. A message names the file, the fact and the remedy."""

# ruff: noqa: N818  the names say what is wrong, and read as such in `except`

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nfm.storage.errors.masked import masked

# How Python shows a byte of a file name that is not UTF-8: as it is, or as repr() writes it.
_ODD_BYTE = re.compile(r"[\udc80-\udcff]|\\udc[89a-f][0-9a-f]")


def legible(text: str) -> str:
    r"""The text with \xe9 in place of every byte of a name that is not UTF-8, so that it can be printed and encoded."""
    found = _ODD_BYTE.sub(lambda byte: rf"\x{ascii(byte[0])[-3:-1]}", text)
    return found.encode("utf-8", "backslashreplace").decode()


def is_utf8(name: str) -> bool:
    """Whether every byte of a name was UTF-8. Keys and manifests require this."""
    try:
        return name.isascii() or bool(name.encode())
    except UnicodeEncodeError:
        return False


class Told(Exception):
    """An error whose message is for users: secrets in URLs are hidden, and every byte of a name can be printed."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(masked(legible(one)) if isinstance(one, str) else one for one in arguments))


class WrongUse(Told):
    """An option, a config or a name that is wrong on any machine. The command then ends with exit code 2.

    Errors of storage and stages derive from this class, so the code that finds the fault also decides the exit code.
    """


class Unusual(UserWarning):
    """What was written is as it was given, and probably not what was meant. A command says it in one line."""


class StorageError(Told):
    """A store or one of its files cannot be used as asked."""


class NoPlace(StorageError, WrongUse):
    """The given place is neither a path nor a URL that can be used there. `reason` says why and what to write."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(_printable(legible(where)), _printable(legible(reason)))

    @property
    def reason(self) -> str:
        return str(self.args[1])

    def __str__(self) -> str:
        return "{}: {}".format(*self.args)


class WrongVariable(StorageError, WrongUse):
    """A variable of the environment with a value that it cannot have. No `NoPlace`, which is told of a place."""

    def __init__(self, variable: str, stated: str, reason: str) -> None:
        super().__init__(variable, _printable(legible(stated)), _printable(legible(reason)))

    def __str__(self) -> str:
        return "{}={}: {}".format(*self.args)


class Misused(StorageError, WrongUse):
    """What was asked cannot be, whoever tries it again: a bucket that is not there, a store that is of another kind."""


def by(shape: Iterable[int]) -> str:
    """A shape as people read it, channels first: `3x64x64`; that of a single number in words."""
    return "x".join(map(str, shape)) or "one value"


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


class OutOfRange(StorageError, IndexError):
    """A slot, row, shard or position that does not exist."""


def check_inside(what: str, numbers: Any, end: int) -> None:
    """Raises OutOfRange unless all of `numbers`, an array, are in 0..end - 1. `what` says what they are, and where."""
    if not numbers.size or (int(numbers.min()) >= 0 and int(numbers.max()) < end):
        return
    outside = numbers[(numbers < 0) | (numbers >= end)]
    more = f" and {outside.size - 1} more are" if outside.size > 1 else " is"
    raise OutOfRange(f"{what} {int(outside.flat[0])}{more} outside 0..{end - 1}")


class CorruptShard(StorageError):
    """The bytes of a shard are not what its commit says: truncated, changed, or of another layout."""


class MissingShard(StorageError):
    """A shard or its commit is missing."""


class NewerSchema(StorageError):
    """A file was written by a newer version of this package."""


class StateMismatch(StorageError):
    """A reader's state belongs to another store, generation or seed."""


_REMEDIES = {
    errno.ENOSPC: "the disk is full: free space or choose another folder and run the same command again",
    errno.EDQUOT: "the quota is used up: free space or choose another folder and run the same command again",
    errno.EFBIG: "the file may not grow that large: raise the limit (ulimit -f) or write smaller shards",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission denied: make the folder writable for this user or choose another one",
    errno.EPERM: "not permitted there: the file system must allow hard links, choose another folder",
    errno.EOPNOTSUPP: "not supported there: the file system must allow hard links, choose another folder",
}


def cannot_write(path: str | Path, error: OSError) -> StorageError:
    """The error to raise when `path` could not be written. What was committed before is unchanged."""
    remedy = _REMEDIES.get(error.errno or 0, "check the file system, then run the same command again")
    what = error.strerror or error
    return StorageError(f"{path}: cannot write ({what}); {remedy}. Committed files are untouched.")
