"""The shards of a large generation: a Parquet file beside its manifest, read into one table and used as a sequence.

Its keys are those of the entries in small manifests. The file is named by its content, so two processes that seal the
same shards write the same file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from nfm.storage.errors import CorruptShard, StorageError
from nfm.storage.files.atomic import HashingFile, digest, read_checked
from nfm.storage.files.paths import is_remote
from nfm.storage.files.small_files import MOST_INDEX_BYTES, read_bytes
from nfm.storage.format import untrusted
from nfm.storage.ledger.shard_list_checks import first_wrong

INLINE = 1000  # a manifest holds up to so many entries itself
MOST = 2_000_000
_ROW_GROUP = 8192
_BATCH = 2048  # rows that iteration holds as dicts at a time
_ROW_BYTES = 8192  # at most, of one decoded row: 64 parts with every text as long as allowed
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
Entry = Mapping[str, Any]


class ShardList(Sequence[Entry]):
    """The entries of a table of `SCHEMA`. They become dicts on access; slices share the table.

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
        return _dicts(self.table.slice(number, 1))[0]

    def __iter__(self) -> Iterator[Entry]:
        for start in range(0, len(self), _BATCH):
            yield from _dicts(self.table.slice(start, _BATCH))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ShardList):
            return bool(self.table.equals(other.table))
        if not isinstance(other, list | tuple) or len(other) != len(self):
            return NotImplemented
        return all(one == two for one, two in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ShardList({len(self)} shards)"


def texts(shards: Sequence[Entry], key: str) -> list[str]:
    """One text of every entry, in order."""
    return shards.table[key].to_pylist() if isinstance(shards, ShardList) else [entry[key] for entry in shards]


def numbers(shards: Sequence[Entry], key: str) -> npt.NDArray[np.int64]:
    """One number of every entry, in order: int64 [n]."""
    if isinstance(shards, ShardList):
        return shards.table[key].to_numpy()
    return np.fromiter((entry[key] for entry in shards), np.int64, len(shards))


def _dicts(rows: pa.Table) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = rows.to_pylist()
    for entry in found:
        if entry["parts"] is None:
            del entry["parts"]
    return found


class ListWriter:
    """Writes a list, one row group at a time. The file gets its name at the end, or is removed."""

    def __init__(self, root: Path) -> None:
        self._root, self._count, self._rows = root, 0, list[Entry]()
        self._file = HashingFile(root / "manifest.parquet")
        # Plain pages: decoded data is never larger than the file says.
        self._sink = _Sink(self._file)
        self._parquet = pq.ParquetWriter(
            pa.PythonFile(self._sink, mode="w"), SCHEMA, compression="zstd", use_dictionary=False
        )

    def add(self, entry: Entry) -> None:
        """Appends one entry."""
        self._rows.append(entry)
        self._count += 1
        if len(self._rows) >= _ROW_GROUP:
            self._flush()

    def publish(self, generation: int) -> dict[str, Any]:
        """Makes the file durable under its name. Returns its reference for the manifest."""
        self._flush()
        self._parquet.close()
        name = list_name(generation, self._file.sha256)
        self._file.path = self._root / name
        self._file.publish()
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


def read_list(root: Path, where: str, generation: int, reference: Entry) -> ShardList:
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
    table = _table(path, data, count)
    wrong = first_wrong(table)
    if wrong is not None:
        raise StorageError(f"{path}: row {wrong} is no shard of a store ({_row(table, wrong)}); restore it from a copy")
    return ShardList(table, name)


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


def _row(table: pa.Table, number: int) -> str:
    try:
        return untrusted.shown(str(table.slice(number, 1).to_pylist()[0]))
    except (ValueError, UnicodeDecodeError):
        return "no text"


def is_list_name(name: str) -> bool:
    """Whether the name of a file at the root of a store is that of a generation's list of shards."""
    return re.fullmatch(r"manifest\.g\d{4,9}\.[0-9a-f]{8}\.parquet", name) is not None


def written(root: Path, generation: int, entries: Iterable[Entry]) -> dict[str, Any]:
    """Writes a whole list. Returns its reference for the manifest."""
    writer = ListWriter(root)
    try:
        for entry in entries:
            writer.add(entry)
        return writer.publish(generation)
    finally:
        writer.discard()
