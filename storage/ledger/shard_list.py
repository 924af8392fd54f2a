"""The shards of a generation: one table, used as a sequence of entries.

Small manifests hold it themselves. That of a large one is a Parquet file beside it, named by its content, so that two
same shards write the same file.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from nfm.storage.errors import CorruptShard, StorageError
from nfm.storage.files.atomic import HashingFile, digest, read_checked
from nfm.storage.files.durable import StoredFile
from nfm.storage.files.paths import is_remote
from nfm.storage.files.small_files import MOST_INDEX_BYTES, read_bytes
from nfm.storage.format import untrusted
from nfm.storage.format.commit import Commit, ShardFiles, file_to_json, part_of, part_to_json
from nfm.storage.ledger.shard_list_checks import first_wrong

INLINE = 1000  # a manifest holds up to so many entries itself
MOST = 2_000_000
_ROW_GROUP = 8192
_BATCH = 2048  # rows that iteration holds at a time
_ROW_BYTES = 8192  # at most, of one decoded row: 64 parts with every text as long as allowed
_NEEDED = {"name", "payload", "sha256", "bytes", "index", "index_sha256", "index_bytes", "records", "commit_sha256"}
_PART = pa.struct([("field", pa.string()), ("sha256", pa.string()), ("bytes", pa.int64())])
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("payload", pa.string()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("index", pa.string()),
        ("index_sha256", pa.string()),
        ("index_bytes", pa.int64()),
        ("records", pa.int64()),
        ("commit_sha256", pa.string()),
        ("parts", pa.list_(_PART)),  # null in layouts whose payload is one file
    ]
)


@dataclass(frozen=True, kw_only=True)
class Entry(ShardFiles):
    """A shard that a generation holds, under the commit whose file has this SHA-256."""

    commit_sha256: str

    @classmethod
    def of(cls, commit: Commit, commit_sha256: str) -> Entry:
        """What a generation lists of a committed shard."""
        files = {field.name: getattr(commit, field.name) for field in dataclasses.fields(ShardFiles)}
        return cls(**files, commit_sha256=commit_sha256)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Entry:
        """A row of a table that was checked."""
        return cls(
            name=row["name"],
            payload=StoredFile(row["payload"], row["sha256"], row["bytes"]),
            index=StoredFile(row["index"], row["index_sha256"], row["index_bytes"]),
            records=row["records"],
            parts=tuple(part_of(row["payload"], part) for part in row["parts"] or ()),
            commit_sha256=row["commit_sha256"],
        )

    def to_json(self) -> dict[str, Any]:
        """How a manifest lists it, by the names of `SCHEMA`."""
        row = {
            "name": self.name,
            **file_to_json("payload", self.payload, ""),
            **file_to_json("index", self.index, "index_"),
            "records": self.records,
            "commit_sha256": self.commit_sha256,
        }
        return row | ({"parts": [part_to_json(part) for part in self.parts]} if self.parts else {})


class ShardList(Sequence[Entry]):
    """The entries of a table of `SCHEMA`. They are made on access; slices share the table.

    `file` is the name of the file that they were read from; None for a slice.
    """

    def __init__(self, table: pa.Table, file: str | None = None) -> None:
        self.table = table
        self.file = file

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, at: int) -> Entry: ...

    @overload
    def __getitem__(self, at: slice) -> ShardList: ...

    def __getitem__(self, at: int | slice) -> Entry | ShardList:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            if step == 1:
                return ShardList(self.table.slice(start, max(stop - start, 0)))
            return ShardList(self.table.take(np.arange(start, stop, step)))
        number = range(len(self))[at]  # raises IndexError
        return next(iter(self[number : number + 1]))

    def __iter__(self) -> Iterator[Entry]:
        for start in range(0, len(self), _BATCH):
            yield from map(Entry.from_json, self.table.slice(start, _BATCH).to_pylist())

    def __repr__(self) -> str:
        return f"ShardList({len(self)} shards)"

    def texts(self, key: str) -> list[str]:
        """One text of every entry, in order, by the name of its column."""
        found: list[str] = self.table[key].to_pylist()
        return found

    def numbers(self, key: str) -> npt.NDArray[np.int64]:
        """One number of every entry, in order, by the name of its column: int64 [n]."""
        found: npt.NDArray[np.int64] = self.table[key].to_numpy()
        return found


class ListWriter:
    """Writes a list, one row group at a time. The file gets its name at the end, or is removed."""

    def __init__(self, root: Path) -> None:
        self._root, self._count, self._rows = root, 0, list[dict[str, Any]]()
        self._file = HashingFile(root / "manifest.parquet")
        # Plain pages: decoded data is never larger than the file says.
        self._sink = _Sink(self._file)
        self._parquet = pq.ParquetWriter(
            pa.PythonFile(self._sink, mode="w"), SCHEMA, compression="zstd", use_dictionary=False
        )

    def add(self, entry: Entry) -> None:
        """Appends one entry."""
        self._rows.append(entry.to_json())
        self._count += 1
        if len(self._rows) >= _ROW_GROUP:
            self._flush()

    def publish(self, generation: int) -> dict[str, Any]:
        """Makes the file durable under its name. Returns its reference for the manifest."""
        self._flush()
        self._parquet.close()
        name = list_name(generation, self._file.sha256)
        self._file.path = self._root / name
        self._file.close()
        return {"file": name, "sha256": self._file.sha256, "bytes": self._file.bytes, "count": self._count}

    def discard(self) -> None:
        """Removes what was written so far. Does nothing after `publish`."""
        self._sink.deaf = True
        self._parquet.close()
        self._file.discard()

    def _flush(self) -> None:
        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, SCHEMA))
            self._rows.clear()


class _Sink(io.RawIOBase):
    """A file object for pyarrow that writes to a file which is hashed on the way."""

    def __init__(self, file: HashingFile) -> None:
        self._to = file
        self.deaf = False  # ignores what pyarrow writes when it closes a discarded file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return memoryview(data).nbytes if self.deaf else self._to.write(data)

    def tell(self) -> int:
        return self._to.bytes


def list_name(generation: int, sha256: str) -> str:
    """The name of a generation's list of shards, relative to the store."""
    return f"manifest.g{generation:04d}.{sha256[:8]}.parquet"


def read_list(root: Path, where: str, generation: int, reference: Mapping[str, Any]) -> ShardList:
    """The shards that a manifest refers to. Raises StorageError unless the file is complete and unchanged."""
    sha256 = untrusted.sha256(f"{where}: shards.sha256", reference.get("sha256"))
    size = untrusted.integer(f"{where}: shards.bytes", reference.get("bytes"), 1, MOST_INDEX_BYTES)
    count = untrusted.integer(f"{where}: shards.count", reference.get("count"), 1, MOST)
    name = untrusted.text(f"{where}: shards.file", reference.get("file"), most=60)
    if name != list_name(generation, sha256):
        raise StorageError(f"{where}: {untrusted.shown(name)} is not the name of its list of shards")
    path = root / name
    try:
        data = read_checked(path, sha256, size) if is_remote(root) else read_bytes(path, size)
    except OSError as error:
        raise StorageError(
            f"{path}: the list of shards cannot be read ({error.strerror or error}); restore it from a copy"
        ) from error
    if len(data) != size or digest(data) != sha256:
        raise CorruptShard(f"{path}: not the {size} bytes that its manifest names; restore it from a copy")
    return ShardList(_right(str(path), _table(path, data, count)), name)


def inline_list(path: Path, entries: Sequence[Any]) -> ShardList:
    """The shards that a manifest lists itself. Raises StorageError for what is no shard of a store."""
    where = f"{path}: shards"
    rows = [untrusted.mapping(f"{where}: a shard", entry) for entry in entries]
    for row in rows:
        if missing := _NEEDED - set(row):
            raise StorageError(f"{where}: one lacks {', '.join(sorted(missing))}; restore the manifest from a copy")
    try:
        table = pa.Table.from_pylist(rows, SCHEMA)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise StorageError(f"{where}: {error}; restore the manifest from a copy") from error
    return ShardList(_right(where, table))


def _right(where: str, table: pa.Table) -> pa.Table:
    """The table, all of whose rows list shards."""
    if (found := first_wrong(table)) is not None:
        row, key = found
        raise StorageError(
            f"{where}: row {row} is no shard of a store: {key} = {_value(table, row, key)}; restore it from a copy"
        )
    return table


def _table(path: Path, data: bytes, count: int) -> pa.Table:
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            about = file.metadata
            columns = [
                about.row_group(group).column(column)
                for group in range(about.num_row_groups)
                for column in range(about.num_columns)
            ]
            plain = all(not column.has_dictionary_page for column in columns)
            decoded = sum(column.total_uncompressed_size for column in columns)
            if about.num_rows != count:
                raise StorageError(f"{path}: {about.num_rows} rows, {count} were sealed; restore it from a copy")
            if not plain or decoded > count * _ROW_BYTES:
                raise StorageError(f"{path}: would decode to more than a list of shards holds; restore it from a copy")
            if not file.schema_arrow.equals(SCHEMA):
                raise StorageError(f"{path}: its columns are not those of a list of shards; restore it from a copy")
            table: pa.Table = file.read(use_threads=False).combine_chunks()
            table.validate(full=True)
            return table
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read as Parquet ({error}); restore it from a copy") from error


def _value(table: pa.Table, row: int, key: str) -> str:
    try:
        return untrusted.shown(table[key][row].as_py())
    except ValueError:
        return "no text"


def is_list_name(name: str) -> bool:
    """Whether the name of a file at the root of a store is that of a generation's list of shards."""
    return re.fullmatch(r"manifest\.g\d{4,9}\.[0-9a-f]{8}\.parquet", name) is not None
