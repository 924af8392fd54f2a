"""The records that make pieces of data exist, parts and shards: `commits/NAME.json`, created by who is first.

A record is a frozen dataclass with `name`, `attempt`, and `file`, the path of what it commits.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.files.paths import remove
from nfm.storage.format import untrusted

FOLDER = "commits"


class Record(Protocol):
    """What is asked of a record."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...
    @property
    def attempt(self) -> str: ...
    @property
    def file(self) -> str: ...


R = TypeVar("R", bound=Record)


def path_of(out: Path, name: str) -> Path:
    return out / FOLDER / f"{name}.json"


def publish(out: Path, record: R) -> R:
    """Commits a piece if nobody has. Returns the valid record; the file of a losing attempt is removed."""
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
