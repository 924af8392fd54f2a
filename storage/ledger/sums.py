"""The totals of all shards of a generation, computed one commit at a time."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nfm.storage.format.commit import Commit
from nfm.storage.format.moments import Moments, pool
from nfm.storage.format.spec import StoreSpec
from nfm.storage.ledger import manifests, shard_list
from nfm.storage.ledger.shard_list import Entry, ListWriter

_NAMES = ("mean", "var", "min", "max", "skewness", "kurtosis", "nonfinite")


class MomentRows:
    """The moments of many shards, kept as plain numbers and then pooled together in order."""

    def __init__(self, spec: StoreSpec) -> None:
        self._values = math.prod(spec.field("noise").shape)
        self._rows = array("d")

    def add(self, records: int, moments: Moments) -> None:
        """Adds the moments of one shard."""
        self._rows.append(float(records))
        self._rows.extend(math.nan if (value := moments.get(name)) is None else float(value) for name in _NAMES)

    def pooled(self) -> Moments:
        """The moments of the union, see `moments.pool`."""
        return pool(self._parts())

    def _parts(self) -> Iterator[tuple[int, Moments]]:
        width = 1 + len(_NAMES)
        for at in range(0, len(self._rows), width):
            values = self._rows[at + 1 : at + width]
            moments = {name: None if math.isnan(value) else value for name, value in zip(_NAMES, values)}
            yield int(self._rows[at]) * self._values, moments


class Sums:
    """Totals over the commits of a generation: moments, clipped values, and how its pairs were encoded."""

    def __init__(self, spec: StoreSpec) -> None:
        self.shards = self.records = self.bytes = 0
        self._clipped = 0
        self._moments = MomentRows(spec)
        self._noise_error: float | None = None
        self._precisions: set[str] = set()
        self._batch_sizes: set[int] = set()

    def add(self, commit: Commit) -> None:
        """Adds the next shard; shards come in order."""
        self.shards += 1
        self.records += commit.records
        self.bytes += commit.payload_bytes
        self._clipped += commit.clipped
        self._moments.add(commit.records, commit.moments)
        if commit.noise_error is not None:
            self._noise_error = max(commit.noise_error, self._noise_error or 0.0)
        self._precisions.add(commit.precision)
        if commit.batch_size is not None:
            self._batch_sizes.add(commit.batch_size)

    def body(self) -> dict[str, Any]:
        """The keys of a manifest that summarise its commits."""
        return {
            "moments": self._moments.pooled(),
            "clipped": self._clipped,
            "bytes": self.bytes,
            "shard_count": self.shards,
            "noise_error": self._noise_error,
            "precision": sorted(self._precisions),
            "batch_sizes": sorted(self._batch_sizes),
        }


class Totals:
    """The totals, the digest and the list of a generation's shards. A context manager that leaves no file after an
    error.

    `same` is the manifest given as `last`, as long as exactly its shards were added.
    """

    def __init__(self, root: Path, spec: StoreSpec, count: int, last: dict[str, Any] | None) -> None:
        self.sums = Sums(spec)
        self._inline: list[Entry] = []
        self._writer = ListWriter(root) if count > shard_list.INLINE else None
        self._digest = hashlib.sha256()
        listed = [] if last is None else manifests.whole(root, dict(last))["shards"]
        self.same = last if len(listed) == count else None
        self._before = iter(listed)

    def add(self, commit: Commit, sha256: str) -> None:
        """Adds the next shard; `sha256` is that of its commit file."""
        entry = entry_of(commit, sha256)
        self._digest.update(("\n" if self.sums.shards else "").encode() + commit.payload_sha256.encode())
        self.sums.add(commit)
        if self._writer is None:
            self._inline.append(entry)
        else:
            self._writer.add(entry)
        if self.same is not None and next(self._before) != entry:
            self.same = None

    def body(self) -> dict[str, Any]:
        """The keys of a manifest that describe its shards together, without `shards` itself."""
        facts = {"content_digest": self._digest.hexdigest(), "records": self.sums.records, "shards": None}
        return facts | self.sums.body()

    def listed(self, generation: int) -> list[Entry] | dict[str, Any]:
        """The value of `shards` in a manifest: the entries, or a reference to the file that lists them, durable."""
        return self._inline if self._writer is None else self._writer.publish(generation)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.discard()


def entry_of(commit: Commit, sha256: str) -> dict[str, Any]:
    """The entry of a shard in a manifest; `sha256` is that of its commit file."""
    entry: dict[str, Any] = {
        "name": commit.name,
        "payload": commit.payload,
        "sha256": commit.payload_sha256,
        "bytes": commit.payload_bytes,
        "index": commit.index,
        "index_sha256": commit.index_sha256,
        "index_bytes": commit.index_bytes,
        "records": commit.records,
        "commit_sha256": sha256,
    }
    return entry | ({"parts": [dict(part) for part in commit.parts]} if commit.parts else {})
