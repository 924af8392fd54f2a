"""The index part of a shard: one row a record, as Parquet, beside the payload."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nfm.storage.atomic import HashingFile, digest
from nfm.storage.errors import CorruptShard, MissingShard, StorageError
from nfm.storage.tar import Array, Payload

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # d000-000000123: draw and slot
        ("slot", pa.int64()),
        ("row", pa.int64()),  # row of the image in the source
        ("draw", pa.int32()),
        ("flip", pa.bool_()),
        ("label", pa.int64()),  # -1 when the store has no labels
        ("group", pa.int64()),  # -1 when there is none
        ("nll", pa.float32()),  # nats per dimension; NaN when the coupling has none
    ]
)


def record_keys(draw: int, slots: Iterable[int]) -> list[str]:
    """The keys of records: d000-000000123."""
    return [f"d{draw:03d}-{slot:09d}" for slot in slots]


def keys_digest(draw: int, slots: Iterable[int]) -> str:
    """SHA-256 over the records' keys, one a line, in their order."""
    return digest("\n".join(record_keys(draw, slots)).encode())


def index_rows(draw: int, arrays: Mapping[str, Array]) -> pa.Table:
    """Rows from arrays over n records: `slot`, and optionally `row`, `flip`, `label`, `group` and `nll`."""
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


def write_index(path: Path, parts: Sequence[pa.Table]) -> Payload:
    """Publishes the rows of `parts`, durable on return. Raises StorageError when the disk is full."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(parts), sink, compression="zstd")
    with HashingFile(path) as file:
        file.write(sink.getvalue())
    return Payload(path, file.sha256, file.bytes)


def read_index(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one part, or some columns of them. Raises MissingShard or CorruptShard."""
    try:
        return pq.read_table(path, columns=None if columns is None else list(columns))
    except FileNotFoundError as error:
        raise MissingShard(f"{path}: the index part is missing; run `nfm audit` on its store") from error
    except (pa.ArrowException, OSError) as error:
        raise CorruptShard(f"{path}: cannot be read as Parquet ({error}); run `nfm audit` on its store") from error
