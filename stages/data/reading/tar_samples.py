"""The samples of a tar as WebDataset groups them: members that follow each other with one name up to the first dot.

Only headers are read here. Nothing is ever unpacked to a path that a tar names. A tar that is cut off, or goes on after
its end, is refused: what stands behind would be lost in silence.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from nfm.stages.base import StageError
from nfm.stages.data.reading.tree import Skipped
from nfm.storage.errors import legible

MOST_HEADER = 1 << 20  # bytes of a long name or of attributes
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
NO_SAMPLE = "a member of a tar without a name before its first dot, or without one after"
META = "a member of a tar that describes the tar"


class Member(NamedTuple):
    """Where a member's bytes lie in the tar."""

    at: int
    bytes: int


@dataclass
class Sample:
    """The members of a sample by what stands after the first dot, in lower case. `problem` says why it is unusable."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    problem: str | None = None


class _Bounded:
    """A file that gives tarfile no more than a header at a time: a damaged one may ask for any size."""

    def __init__(self, file: IO[bytes]):
        self.file, self.tell, self.seek = file, file.tell, file.seek

    def read(self, count: int) -> bytes:
        if not 0 <= count <= MOST_HEADER:
            raise tarfile.ReadError(f"a header of {count:,} bytes")
        return self.file.read(count)


def samples(file: IO[bytes], where: Path, skipped: Skipped) -> Iterator[Sample]:
    """The samples of a tar in order. Members that belong to none are counted in `skipped`.

    Raises StageError, naming the tar, if it is none, damaged, cut off, or goes on after its end.
    """
    current: Sample | None = None
    seen: set[str] = set()
    for info in _members(file, where):
        name = info.name.removeprefix("./")
        if info.isdir() or (match := _NAME.fullmatch(name)) is None or name.startswith("__"):
            if not info.isdir():
                skipped.add(META if name.startswith("__") else NO_SAMPLE, f"{where.name}/{name}")
            continue
        key, kind = match[1], match[2].lower()
        if current is None or key != current.key:
            if current is not None:
                yield current
            current = Sample(key)
            if key in seen:
                current.problem = "another sample of the same tar has its key: give each sample a key of its own"
            seen.add(key)
        if problem := _problem(info, name, kind in current.members):
            current.problem = current.problem or problem
        current.members[kind] = Member(info.offset_data, info.size)
    if current is not None:
        yield current


def _problem(info: tarfile.TarInfo, name: str, twice: bool) -> str | None:
    shown = legible(name)
    if name.startswith("/") or ".." in name.split("/"):
        return f"its member {shown} names a place outside of the tar: pack it by a relative name"
    if not info.isreg() or info.issparse():
        return f"its member {shown} is a link, a device or the like: pack the file itself"
    return f"it has two members {shown}: keep one" if twice else None


def _members(file: IO[bytes], where: Path) -> Iterator[tarfile.TarInfo]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(4)
    file.seek(0)
    if start[:2] == b"\x1f\x8b" or start[:3] in (b"BZh", b"\xfd7z") or start == b"\x28\xb5\x2f\xfd":
        raise StageError(f"{where}: is compressed, and images are compressed already: unpack it")
    try:
        with tarfile.open(fileobj=_Bounded(file), mode="r:") as tar:  # type: ignore[call-overload]
            after = -1
            while (info := tar.next()) is not None:
                tar.members = []  # else every header stays in memory
                if info.offset <= after or info.size < 0 or (info.isreg() and info.offset_data + info.size > size):
                    raise tarfile.ReadError(f"{info.name} has {info.size:,} bytes by its header, more than are there")
                after = info.offset
                yield info
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise StageError(f"{where}: is no whole tar ({legible(str(error))}): fetch it anew, or take it away") from error
    _check_end(file, end, size, where)


def _check_end(file: IO[bytes], end: int, size: int, where: Path) -> None:
    """A tar ends with zeros. tarfile also stops, and says nothing, at a damaged header and where a tar was cut off."""
    if size < end + tarfile.BLOCKSIZE:
        raise StageError(
            f"{where}: is cut off after {size:,} bytes, the end of the tar is missing: fetch it anew, or take it away"
        )
    file.seek(end)
    while piece := file.read(MOST_HEADER):
        if piece.strip(b"\0"):
            raise StageError(
                f"{where}: goes on after the end of the tar, at byte {end:,}: it is damaged, or several tars one after "
                "the other; fetch it anew, or split it"
            )
