"""The data stage's artifact: uint8 images and labels in shards, split in `train` and `heldout`, with a key a
row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from nfm.storage.atomic import HashingFile, hash_file, read_json, write_json
from nfm.storage.batch import Arrays
from nfm.storage.convert import to_float32
from nfm.storage.errors import NewerSchema, StorageError
from nfm.storage.index import read_index
from nfm.storage.order import Order, Rows, order_key
from nfm.storage.reader import BatchReader
from nfm.storage.schema import FORMAT, Field
from nfm.storage.sequence import ShardSequence
from nfm.storage.tar import ShardWriter

DATASET = "dataset.json"
VALUE_RANGE = (-1.0, 1.0)
_ROWS_PER_BLOCK = 256
_TABLE = pa.schema([("row", pa.int64()), ("key", pa.string()), ("label", pa.int64())])
_REJECTED = pa.schema([("key", pa.string()), ("reason", pa.string())])

Chunk = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], Sequence[str]]


def _fields(image_shape: tuple[int, ...]) -> tuple[Field, ...]:
    return Field("image", "uint8", image_shape, "image"), Field("label", "int64", (), "label")


class DatasetWriter:
    """Writes a dataset: each split once, then `close`, which publishes dataset.json last.

    `classes` are the names of labels 0, 1, ...; without classes every label is -1. A folder in which an
    earlier writer was killed is written again.
    """

    def __init__(
        self,
        root: str | Path,
        name: str,
        image_shape: tuple[int, ...],
        classes: Sequence[str],
        rows_per_shard: int = 4096,
    ) -> None:
        self.root = Path(root)
        self.files: dict[str, tuple[str, int]] = {}  # the tables: (sha256, bytes) by relative path
        self._name = name
        self._image_shape = tuple(image_shape)
        self._classes = list(classes)
        self._rows_per_shard = rows_per_shard
        self._splits: dict[str, Any] = {}

    def write_split(self, split: str, rows: int, chunks: Iterable[Chunk]) -> None:
        """Writes exactly `rows` records from chunks of (images uint8 [n, C, H, W], labels [n], keys [n]).

        Raises StorageError for another number of records, another shape or dtype, and labels without a class.
        """
        pieces = self._pieces(split, chunks)
        piece, at, written, shards, tables = next(pieces, None), 0, 0, [], []
        for number in range(-(-rows // self._rows_per_shard)):
            file = f"{split}/s{number:05d}.tar"
            records = min(self._rows_per_shard, rows - written)
            with ShardWriter(
                self.root / file,
                _fields(self._image_shape),
                records,
                f"{split}-s{number:05d}",
                _ROWS_PER_BLOCK,
            ) as shard:
                while shard.written < records and piece is not None:
                    images, labels, keys = piece
                    end = min(len(keys), at + records - shard.written)
                    shard.append({"image": images[at:end], "label": labels[at:end]})
                    row = np.arange(written, written + end - at)
                    tables.append(pa.table([row, list(keys[at:end]), labels[at:end]], schema=_TABLE))
                    written += end - at
                    piece, at = (piece, end) if end < len(keys) else (next(pieces, None), 0)
                if shard.written < records:
                    raise StorageError(f"{self.root}: {split} ended after {written} records, {rows} were announced")
                payload = shard.close()
            shards.append({"file": file, "records": records, "sha256": payload.sha256, "bytes": payload.bytes})
        if piece is not None:
            raise StorageError(f"{self.root}: {split} has more records than the {rows} announced")
        self._write_table(f"{split}.parquet", pa.concat_tables([_TABLE.empty_table(), *tables]))
        self._splits[split] = {
            "rows": rows,
            "rows_per_shard": self._rows_per_shard,
            "shards": shards,
            "table": f"{split}.parquet",
        }

    def close(self, rejected: Sequence[tuple[str, str]] = ()) -> dict[str, tuple[str, int]]:
        """Publishes rejected.parquet from pairs (key, reason), then dataset.json.

        Returns (sha256, bytes) of the payload, by relative path, in order: the shards of every split and
        dataset.json. The tables are in `files`.
        """
        columns = [[key for key, _ in rejected], [reason for _, reason in rejected]]
        self._write_table("rejected.parquet", pa.table(columns, schema=_REJECTED))
        body = {
            "format": FORMAT,
            "name": self._name,
            "image_shape": list(self._image_shape),
            "dtype": "uint8",
            "value_range": list(VALUE_RANGE),
            "classes": self._classes,
            "rows_per_block": _ROWS_PER_BLOCK,
            "splits": self._splits,
        }
        write_json(self.root / DATASET, body)
        payload = {
            shard["file"]: (shard["sha256"], shard["bytes"])
            for split in self._splits.values()
            for shard in split["shards"]
        }
        return payload | {DATASET: hash_file(self.root / DATASET)}

    def _pieces(self, split: str, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        for images, labels, keys in chunks:
            labels = np.asarray(labels, np.int64)
            if not len(images) == len(labels) == len(keys):
                raise StorageError(
                    f"{self.root}: {split} got {len(images)} images, {len(labels)} labels and {len(keys)} keys"
                )
            low, high = (0, len(self._classes) - 1) if self._classes else (-1, -1)
            wrong = np.flatnonzero((labels < low) | (labels > high))
            if len(wrong):
                raise StorageError(
                    f"{self.root}: {split} record {keys[wrong[0]]!r} has label {labels[wrong[0]]}, outside "
                    f"{low}..{high} (there are {len(self._classes)} classes)"
                )
            if len(keys):
                yield images, labels, keys

    def _write_table(self, file: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        with HashingFile(self.root / file) as out:
            out.write(sink.getvalue())
        self.files[file] = (out.sha256, out.bytes)


class ImageDataset:
    """One split of a dataset, mapped from its shards: rows 0..n-1 in the order of ingestion."""

    generation = None

    def __init__(self, root: Path, split: str, body: Mapping[str, Any]) -> None:
        part = body["splits"][split]
        self.root = root
        self.name: str = body["name"]
        self.split = split
        self.image_shape: tuple[int, ...] = tuple(body["image_shape"])
        self.classes: list[str] = list(body["classes"])
        low, high = body["value_range"]
        self.value_range: tuple[float, float] = (low, high)
        self.content_digest: str = body["digest"]
        self.order_key = order_key(f"{body['digest']}:{split}", part["rows"], 1)
        self._table = root / part["table"]
        self._keys: pa.ChunkedArray | None = None
        self._shards = ShardSequence(
            [root / shard["file"] for shard in part["shards"]],
            _fields(self.image_shape),
            part["rows"],
            part["rows_per_shard"],
            body["rows_per_block"],
        )

    @classmethod
    def open(cls, root: str | Path, split: str = "train") -> ImageDataset:
        """Opens a split. Raises StorageError when there is no such dataset or split, NewerSchema."""
        root = Path(root)
        body = read_json(root / DATASET)
        if body.get("format", FORMAT) > FORMAT:
            raise NewerSchema(
                f"{root / DATASET}: format {body['format']}, this nfm-pairs reads up to {FORMAT}; install a newer one"
            )
        if "digest" not in body or "splits" not in body:
            raise StorageError(f"{root / DATASET}: no dataset of the data stage; run `nfm run data` again")
        if split not in body["splits"]:
            raise StorageError(f"{root / DATASET}: no split {split!r}, only {', '.join(body['splits'])}")
        return cls(root, split, body)

    def __len__(self) -> int:
        return len(self._shards)

    def images(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """uint8 [n, C, H, W] at these rows, in any order."""
        return self._shards.gather(["image"], rows)["image"]

    def labels(self, rows: Rows) -> npt.NDArray[np.int64]:
        """int64 [n] at these rows, -1 for data without classes."""
        return self._shards.gather(["label"], rows)["label"]

    def keys(self, rows: Rows) -> list[str]:
        """The names that the source gave to these rows."""
        if self._keys is None:
            self._keys = read_index(self._table, ["key"])["key"]
        return self._keys.take(pa.array(np.asarray(rows, np.int64))).to_pylist()

    def to_float(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """float32 in `value_range`, same shape."""
        return to_float32(images, self.value_range)

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = None,
        *,
        shuffle: Literal["full", "windowed"] | None = "full",
        window: int = 16,
        last: Literal["drop", "keep"] = "drop",
        rank: int | None = None,
        world_size: int | None = None,
        device: Any = None,
        copy: bool = False,
        prefetch: bool = True,
    ) -> BatchReader:
        """Batches without noise, endless by default; the options are those of `PairStore.batches`."""
        order = Order(self.order_key, len(self), self._shards.rows_per_shard, seed, batch_size, shuffle, window, last)
        return BatchReader(
            self,
            order,
            epochs=epochs,
            rank=rank,
            world_size=world_size,
            device=device,
            copy=copy,
            prefetch=prefetch,
        )

    def draw(self, epoch: int) -> int:
        """Always 0: a dataset has one draw."""
        return 0

    def empty(self, records: int) -> Arrays:
        """Buffers to gather into."""
        return self._shards.empty(["image", "label"], records)

    def gather(self, draw: int, rows: Rows, out: Arrays | None = None) -> Arrays:
        """image and label at these rows, as stored, in `out` if given."""
        return self._shards.gather(["image", "label"], rows, out)
