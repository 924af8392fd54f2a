"""Requests to an object store. They are tried again while the error may be temporary, and then explained."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from nfm.storage.errors import CorruptShard, Misused, StorageError
from nfm.storage.errors.masked import masked
from nfm.storage.files import clouds
from nfm.storage.files.clouds import failures
from nfm.storage.files.parallel import parallel
from nfm.storage.files.places import answer_seconds, patience

T = TypeVar("T")
_log = logging.getLogger("nfm.storage")
_PIECE = 8 << 20  # bytes of one ranged request
_AHEAD = 4  # ranged requests of one file at a time
_SPOILT_TRIES = 3


def file_system(path: Path) -> Any:
    """The fsspec file system of a URL. It is looked up each time, because a forked child must have its own."""
    import fsspec

    where: Any = path
    cloud = clouds.of(where)
    try:
        found = fsspec.filesystem(where.protocol, **where.storage_options)
    except ImportError as error:
        bring = f"install it with `pip install 'nfm-pairs[{cloud.EXTRA}]'`" if cloud else "install that package"
        raise StorageError(f"{path}: {error}; {where.protocol}:// needs that package: {bring}") from error
    if (cloud := clouds.of(found)) is not None:
        cloud.prepare(found, answer_seconds())
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
    began, pause, limit, warned, spoilt = time.monotonic(), 0.1, patience(), False, 0
    while True:
        try:
            return action(file_system(path), getattr(path, "path"))  # noqa: B009 not an attribute of pathlib's paths
        except StorageError:
            raise
        except Exception as raised:
            error = failures.behind(raised)
            if isinstance(error, failures.ANSWERS) and not _no_bucket(doing, error):
                raise
            left = limit - (time.monotonic() - began)
            spoilt += failures.damaged(error) or failures.garbled(error)
            if not failures.may_pass(error) or left <= 0 or spoilt == _SPOILT_TRIES:
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
        except (StorageError, *failures.ANSWERS):
            raise gave_up from gave_up.__cause__


def read_range(path: Path, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes start to stop of an object; fewer if it ends there, or if an answer is cut short."""

    def read(fs: Any, name: str) -> bytes:
        try:
            return bytes(fs.cat_file(name, start=start, end=stop))
        except Exception as error:
            if failures.status_of(error) == 416:  # the object ends before `start`
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


def explained(path: Path, doing: str, error: BaseException) -> StorageError:
    """The error for the user: which URL, what is wrong, what to do."""
    if failures.damaged(error):
        return CorruptShard(f"{path}: cannot {doing} ({_text(error)}), {_SPOILT_TRIES} times; restore it from a copy")
    kind = Misused if _no_bucket(doing, error) or failures.misstated(error) else StorageError
    return kind(f"{path}: cannot {doing} ({_text(error)}); {_remedy(path, doing, error)}")


def _no_bucket(doing: str, error: BaseException) -> bool:
    """Whether there is no such bucket: nothing else can be missing for a write, if no local file is."""
    missing = isinstance(error, FileNotFoundError) and error.filename is None
    return failures.no_bucket(error) or (doing == "write" and missing)


def _remedy(path: Path, doing: str, error: BaseException) -> str:
    cloud = clouds.of(path)
    if failures.no_credentials(error):
        return f"no usable credentials were found: set {cloud.CREDENTIALS if cloud else 'those of the object store'}"
    if _no_bucket(doing, error):
        return "there is no such bucket: create it, or correct the URL"
    if failures.denied(error):
        return (
            "access is denied: check the credentials (key, secret, clock) and the bucket's policy; reading needs the "
            "right to get and list objects, writing to put and delete them"
        )
    if failures.status_of(error) is not None and failures.may_pass(error):
        return f"the object store kept failing for {patience():.0f} s (NFM_PATIENCE): run the same command again later"
    stated = next((name for name in cloud.ENDPOINTS if os.environ.get(name)), None) if cloud else None
    # A connection string holds a key, which is masked in URLs alone.
    shown = masked(os.environ[stated]) if stated in clouds.SHOWN else "set"
    named = f" ({stated} is {shown})" if stated else ""
    if failures.may_pass(error) and not failures.garbled(error):
        return f"no answer within {patience():.0f} s (NFM_PATIENCE): check the network and the endpoint{named}"
    return f"check the URL and the endpoint{named}"


def _text(error: BaseException) -> str:
    text = masked(" ".join(str(error).split()))  # hide secrets before the text is cut, which could split one
    return (text if len(text) <= 300 else text[:297] + "...") or type(error).__name__
