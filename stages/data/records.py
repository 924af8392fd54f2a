"""The records that make pieces of data exist, parts and shards: `commits/NAME.json`, created by who is first.

A record is a frozen dataclass with `name`, `attempt`, and `file`, the path of what it commits, which has no `bytes`
where there is no file. Records and files are where all workers see them: in a folder, or in the bucket of an artifact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from nfm.stages.base import Reporter, Stopped
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.files.copies import mirror
from nfm.storage.files.parallel import parallel
from nfm.storage.files.paths import as_path, is_remote, remove
from nfm.storage.format import untrusted

FOLDER = "commits"
_FILES = 4  # brought at a time, each in several requests


class Record(Protocol):
    """What is asked of a record."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...
    @property
    def attempt(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def bytes(self) -> int: ...


R = TypeVar("R", bound=Record)


def path_of(out: Path, name: str) -> Path:
    return out / FOLDER / f"{name}.json"


def shared_place(out: Path, executor: str) -> Path:
    """Where the records are of an artifact that is made in the folder `out`: there, or in its bucket if workers of
    other machines make them.
    """
    return out if executor == "serial" else as_path(mirror.origin(out))


def publish(out: Path, record: R, here: Path) -> R:
    """Commits a piece if nobody has. Its file is in `here`, and brought to `out` first if that is in a bucket.

    Returns the valid record; the file of a losing attempt is removed.
    """
    if record.bytes and is_remote(out):
        # No other attempt writes to that name.
        mirror.push(out, here, {record.file: (record.sha256, record.bytes)}, lambda: None)
    if atomic.create_json(path_of(out, record.name), asdict(record)):
        return record
    winner = read(type(record), out, record.name)
    if winner.attempt != record.attempt:
        remove(out / record.file)
    return winner


def read(kind: type[R], out: Path, name: str) -> R:
    """The record of a piece. Raises StorageError if there is none, or if it is damaged."""
    path = path_of(out, name)
    body = untrusted.mapping(str(path), atomic.read_json(path))
    try:
        found = kind(**{key: value for key, value in body.items() if key != "digest"})
    except TypeError as error:
        raise StorageError(f"{path}: no commit of this stage ({error}); remove it and run the stage again") from None
    if found.name != name:
        raise StorageError(f"{path}: is the commit of {str(found.name)[:40]}; remove it and run the stage again")
    return found


def bring(shared: Path, out: Path, records: Sequence[Record], report: Reporter) -> None:
    """Brings the files of all pieces from a bucket to the folder `out`. Raises Stopped if the user asks to stop."""
    if not is_remote(shared):
        return
    report.say(f"all {len(records)} are committed; their files are brought here from {shared}")
    files = [{"path": made.file, "sha256": made.sha256, "bytes": made.bytes} for made in records if made.bytes]
    for _ in parallel(lambda file: mirror.fetch(shared, out, file), files, _FILES):
        if report.stopping:
            raise Stopped
