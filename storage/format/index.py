"""The index part of a shard: a Parquet file beside the payload, with one row for each record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from nfm.storage.errors import CorruptShard, MissingShard, StorageError
from nfm.storage.files.atomic import digest, read_checked
from nfm.storage.files.durable import HashingFile, StoredFile
from nfm.storage.files.paths import as_path, is_remote
from nfm.storage.files.small_files import MOST_INDEX_BYTES, plain, read_bytes

Array = npt.NDArray[Any]

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # draw and slot: d000-000000123
        ("slot", pa.int64()),
        ("row", pa.int64()),  # row of the image in the source
        ("draw", pa.int32()),
        ("flip", pa.bool_()),
        ("label", pa.int64()),  # -1 if the store has no labels
        ("group", pa.int64()),  # -1 if there is none
        ("nll", pa.float32()),  # nats per dimension; NaN if the coupling has none
    ]
)


def record_keys(draw: int, slots: Iterable[int]) -> list[str]:
    """The keys of records, such as d000-000000123."""
    return [f"d{draw:03d}-{slot:09d}" for slot in slots]


def keys_digest(draw: int, slots: Iterable[int]) -> str:
    """SHA-256 over the records' keys in order, one a line."""
    return digest("\n".join(record_keys(draw, slots)).encode())


def index_rows(draw: int, arrays: Mapping[str, Array]) -> pa.Table:
    """Index rows from arrays over n records: `slot`, and optionally `row`, `flip`, `label`, `group` and `nll`."""
    slot = arrays["slot"]
    count = len(slot)
    columns: dict[str, Any] = {
        "key": record_keys(draw, slot.tolist()),
        "slot": slot,
        "row": arrays.get("row", slot),
        "draw": np.full(count, draw, np.int32),
        "flip": np.asarray(arrays.get("flip", np.zeros(count)), bool),
        "label": arrays.get("label", np.full(count, -1)),
        "group": arrays.get("group", np.full(count, -1)),
        "nll": np.asarray(arrays.get("nll", np.full(count, np.nan)), np.float32),
    }
    for name, values in columns.items():
        if len(values) != count:
            raise StorageError(f"index column {name!r}: {len(values)} values for {count} records; give one a record")
    # from_pandas=False: pyarrow would turn NaN into null.
    return pa.table(
        {name: pa.array(values, INDEX_SCHEMA.field(name).type, from_pandas=False) for name, values in columns.items()},
        schema=INDEX_SCHEMA,
    )


def write_index(path: Path, parts: Sequence[pa.Table]) -> StoredFile:
    """Writes the rows of `parts`; durable on return. Raises StorageError if the disk is full."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(parts), sink, compression="zstd")
    with HashingFile(path) as file:
        file.write(sink.getvalue())
    return file.stored


def _opened(path: Path, sha256: str | None) -> Any:
    if not is_remote(path):
        return plain(path)
    return pa.BufferReader(read_bytes(path, MOST_INDEX_BYTES) if sha256 is None else read_checked(path, sha256))


def read_index(
    path: str | Path, columns: Sequence[str] | None = None, records: int | None = None, sha256: str | None = None
) -> pa.Table:
    """The rows of one index part, or some of its columns. There must be `records` rows, if given.

    A file from an object store must have the given SHA-256. Raises MissingShard or CorruptShard. The number of rows is
    checked before anything is read.
    """
    path = as_path(path)
    try:
        with _opened(path, sha256) as file, pq.ParquetFile(file) as part:
            if records is not None and part.metadata.num_rows != records:
                raise _corrupt(path, f"{part.metadata.num_rows} rows, {records} were committed")
            table = part.read(columns=None if columns is None else list(columns), use_threads=False)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingShard(f"{path}: the index part is missing; run `nfm audit` on its store") from error
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _corrupt(path, f"cannot be read as Parquet ({error})") from error
    if len(set(table.column_names)) < len(table.column_names):
        raise _corrupt(path, "it has a column twice")
    for field in table.schema:
        if field.name in INDEX_SCHEMA.names and field.type != INDEX_SCHEMA.field(field.name).type:
            raise _corrupt(path, f"its column {field.name!r} is {field.type}")
    if columns is None:
        return table
    if set(columns) - set(table.column_names):
        raise _corrupt(path, f"it has only the columns {', '.join(table.column_names)}")
    return table.select(list(columns))


def _corrupt(path: Path, what: str) -> CorruptShard:
    return CorruptShard(f"{path}: {what}; run `nfm audit` on its store")
