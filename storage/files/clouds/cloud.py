"""What each object store's module gives. `fs` is its fsspec file system, `name` the name of an object there.

Errors are those of its client, for `remote.attempt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Stored:
    """What an object holds, the tag of this version, and its age in seconds by the server's clock."""

    data: bytes
    tag: str
    age: float = 0.0


class NoSuchBucket(Exception):  # noqa: N818 - the name that S3 gives it
    """There is no bucket of this name."""


class Cloud(Protocol):
    """An object store: the conditional writes that locks need, and what fsspec does not level."""

    EXTRA: str  # the extra of this package that brings the client
    CREDENTIALS: str  # what to set where no credentials are found
    ENDPOINTS: tuple[str, ...]  # variables that name where it is, the first one set wins
    CONDITIONS: tuple[str, str]  # its words for: that there is no object; that it is the version of a tag
    PARTS: float  # bytes from which on a file is uploaded in parts
    MOST: float  # bytes of the largest upload in one request

    def options(self, protocol: str, seconds: float) -> dict[str, Any]:
        """Options of the file system, whose requests end after so many seconds without an answer."""
        ...

    def prepare(self, fs: Any, seconds: float) -> None:
        """Leaves it to `remote.attempt` to try again, which says so and knows how long. May be called again."""
        ...

    def read(self, fs: Any, name: str) -> Stored:
        """An object. Raises FileNotFoundError."""
        ...

    def put(self, fs: Any, name: str, data: bytes, tag: str | None) -> str | None:
        """Writes an object if the stored version is the one of `tag`, or for None, if there is no object.

        Returns the new tag, or None if the condition does not hold.
        """
        ...

    def remove(self, fs: Any, name: str, tag: str) -> None:
        """Removes the version of this tag. Does nothing if there is another one."""
        ...

    def copy(self, fs: Any, source: str, target: str) -> None:
        """Copies an object, and returns when all of it is there. Raises FileNotFoundError."""
        ...

    def parts_are_refused(self, fs: Any, name: str) -> bool:
        """Whether an upload in parts leaves an object alone that is there, if it may only create one."""
        ...

    def facts(self, item: Mapping[str, Any]) -> tuple[float | None, str]:
        """When the object of an entry of a listing was written, in seconds since 1970, and its tag."""
        ...
