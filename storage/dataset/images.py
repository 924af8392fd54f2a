"""The output of the data stage: images (uint8, or floats such as latents) and labels, stored in shards.

There are two splits, `train` and `heldout`. Every row has a key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from nfm.storage.dataset.record import DATASET, SPLIT_NAME, check_record, read_record
from nfm.storage.errors import StorageError, check_inside, is_utf8
from nfm.storage.errors.arguments import WrongArgument, checked, checked_later, instance, numbers, shown, whole, wrong
from nfm.storage.files.atomic import HashingFile, hash_file, write_json
from nfm.storage.files.durable import StoredFile
from nfm.storage.files.paths import inside, local_path
from nfm.storage.format import untrusted
from nfm.storage.format.convert import to_float32
from nfm.storage.format.index import read_index
from nfm.storage.format.order import Rows, Shuffle, order_key
from nfm.storage.format.spec import FORMAT, Field
from nfm.storage.layouts import Shard
from nfm.storage.layouts.tar_blocks import MappedShard, ShardWriter
from nfm.storage.reading.reader import BatchReader, ReadOptions
from nfm.storage.reading.shards import ShardSequence
from nfm.storage.reading.stream import Arrays, StoreStream

VALUE_RANGE = (-1.0, 1.0)
DTYPES = ("uint8", "float16", "float32")
_ROWS_PER_BLOCK = 256
CAPTION = "caption"  # a column that only data with captions has
_TABLE = pa.schema([("row", pa.int64()), ("key", pa.string()), ("label", pa.int64())])
_REJECTED = pa.schema([("key", pa.string()), ("reason", pa.string())])

Chunk = tuple[npt.NDArray[Any], npt.NDArray[np.int64], Sequence[str]]


def _fields(image_shape: tuple[int, ...], dtype: str) -> tuple[Field, ...]:
    return Field("image", dtype, image_shape, "image"), Field("label", "int64", (), "label")


def shard_writer(
    path: Path, split: str, number: int, records: int, image_shape: tuple[int, ...], dtype: str
) -> ShardWriter:
    """A writer of shard `number` of a split, at any path."""
    return ShardWriter(path, _fields(image_shape, dtype), records, f"{split}-s{number:05d}", _ROWS_PER_BLOCK)


class DatasetWriter:
    """Writes a dataset of images: write each split once, then call `close`, which writes dataset.json last.

    `classes` are the names of the labels 0, 1, ...; without classes every label is -1. `dtype` is the type of the
    images. If they are floats (latents), they are divided by `image_scale`, and `image_shift` is added, before
    `image_decoder` turns them into pictures. If an earlier writer was killed in this folder, writing starts from the
    beginning.
    """

    @checked()
    def __init__(
        self,
        root: str | Path,
        name: str,
        image_shape: tuple[int, ...],
        classes: Sequence[str],
        rows_per_shard: int = 4096,
        dtype: str = "uint8",
        image_scale: float | None = None,
        image_decoder: str | None = None,
        image_shift: float | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise StorageError(f"{root}: images of dtype {dtype!r}; convert them to one of {', '.join(DTYPES)}")
        self.root = local_path(root)
        self.files: dict[str, tuple[str, int]] = {}  # the tables: (sha256, bytes) by relative path
        self._name = name
        self._image_shape = tuple(image_shape)
        self._classes = list(classes)
        self._dtype = dtype
        self._about = {"image_scale": image_scale, "image_decoder": image_decoder, "image_shift": image_shift}
        self._rows_per_shard = rows_per_shard
        self._splits: dict[str, Any] = {}
        self._closed = False
        empty = {"rows": 0, "rows_per_shard": rows_per_shard, "shards": [], "table": "train.parquet"}
        check_record(self.root / DATASET, self._record({"train": empty}))  # fail now, not after hours of writing

    @checked(rows=whole(), chunks=checked_later, captions=checked_later)
    def write_split(
        self, split: str, rows: int, chunks: Iterable[Chunk], captions: Sequence[str | None] | None = None
    ) -> None:
        """Writes exactly `rows` records from chunks of (images [n, C, H, W], labels [n], keys [n]).

        `captions` are one text a record, None where there is none; they become a column of the split's table. Raises
        StorageError if the number of records, the shape or the dtype differs, if a label has no class, or if a
        value is not finite, for a split that is written already, and after `close`.
        """
        self._check_new(split)
        pieces = self._pieces(split, chunks)
        piece, at, written, shards, tables = next(pieces, None), 0, 0, [], []
        for number in range(-(-rows // self._rows_per_shard)):
            file = f"{split}/s{number:05d}.tar"
            records = min(self._rows_per_shard, rows - written)
            with shard_writer(self.root / file, split, number, records, self._image_shape, self._dtype) as shard:
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
                (payload,) = shard.close()
            shards.append({"file": file, "records": records, "sha256": payload.sha256, "bytes": payload.bytes})
        if piece is not None:
            raise StorageError(f"{self.root}: {split} has more records than the {rows} announced")
        self._add_split(split, shards, pa.concat_tables([_TABLE.empty_table(), *tables]), captions)

    @checked(shards=checked_later, labels=checked_later, keys=checked_later, captions=checked_later)
    def adopt_split(
        self,
        split: str,
        shards: Sequence[StoredFile],
        labels: npt.NDArray[np.int64],
        keys: Sequence[str],
        captions: Sequence[str | None] | None = None,
    ) -> None:
        """A split whose shards others wrote with `shard_writer`, at their places, `SPLIT/s00000.tar` and so on."""
        self._check_new(split)
        left = range(0, len(keys), self._rows_per_shard)
        records = [min(self._rows_per_shard, len(keys) - start) for start in left]
        entries = [
            {"file": f"{split}/s{number:05d}.tar", "records": count, "sha256": shard.sha256, "bytes": shard.bytes}
            for number, (count, shard) in enumerate(zip(records, shards, strict=True))
        ]
        rows = np.arange(len(keys))
        self._add_split(split, entries, pa.table([rows, list(keys), labels], schema=_TABLE), captions)

    def _add_split(
        self, split: str, shards: list[dict[str, Any]], table: pa.Table, captions: Sequence[str | None] | None
    ) -> None:
        if captions is not None:
            _check_texts(f"{self.root}: {split}: a caption", captions, or_none=True)
            if len(captions) != len(table):
                raise StorageError(f"{self.root}: {split} got {len(captions)} captions for {len(table)} records")
            table = table.append_column(CAPTION, pa.array(captions, pa.string()))
        self._write_table(f"{split}.parquet", table)
        self._splits[split] = {
            "rows": len(table),
            "rows_per_shard": self._rows_per_shard,
            "shards": shards,
            "table": f"{split}.parquet",
        }

    @checked(rejected=checked_later)
    def close(self, rejected: Sequence[tuple[str, str]] = ()) -> dict[str, tuple[str, int]]:
        """Writes rejected.parquet from pairs (key, reason), then dataset.json.

        Returns (sha256, bytes) of each payload file, by relative path and in order: the shards of every split, then
        dataset.json. The tables are in `files`.
        """
        self._check_open()
        if not all(isinstance(one, tuple | list) and len(one) == 2 for one in rejected):
            raise wrong("rejected", rejected, "pairs of texts (key, reason)")
        for number, what in enumerate(("a rejected key", "a reason")):
            _check_texts(f"{self.root}: {what}", [pair[number] for pair in rejected])
        columns = [[key for key, _ in rejected], [reason for _, reason in rejected]]
        self._write_table("rejected.parquet", pa.table(columns, schema=_REJECTED))
        write_json(self.root / DATASET, check_record(self.root / DATASET, self._record(self._splits)))
        payload = {
            shard["file"]: (shard["sha256"], shard["bytes"])
            for split in self._splits.values()
            for shard in split["shards"]
        }
        self._closed = True
        return payload | {DATASET: hash_file(self.root / DATASET)}

    def _check_new(self, split: str) -> None:
        """Raises StorageError for a split that cannot be written, or not any more."""
        self._check_open()
        untrusted.text(f"{self.root}: split", split, SPLIT_NAME, 100)
        if split in self._splits:
            raise StorageError(f"{self.root}: the split {split!r} is written already; write each split once")

    def _check_open(self) -> None:
        if self._closed:
            raise StorageError(f"{self.root}: this writer is closed; write another dataset with another writer")

    def _record(self, splits: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self._name,
            "image_shape": list(self._image_shape),
            "dtype": self._dtype,
            "value_range": list(VALUE_RANGE),
            "classes": self._classes,
            "rows_per_block": _ROWS_PER_BLOCK,
            "splits": splits,
            **{key: value for key, value in self._about.items() if value is not None},
        }

    def _pieces(self, split: str, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        where = f"{self.root}: {split}"
        for chunk in chunks:
            if not isinstance(chunk, tuple | list) or len(chunk) != 3 or not isinstance(chunk[0], np.ndarray):
                raise StorageError(
                    f"{where} got {shown(chunk)} as a chunk: give (images, labels, keys), the images as a numpy array"
                )
            images, labels, keys = chunk
            labels = numbers(f"{where}: labels", labels)
            _check_texts(f"{where}: a key", keys)
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
            if images.dtype.kind == "f" and len(
                bad := np.flatnonzero(~np.isfinite(images).reshape(len(keys), -1).all(1))
            ):
                raise StorageError(
                    f"{self.root}: {split} record {keys[bad[0]]!r} has values that are not finite; set it aside"
                )
            if len(keys):
                yield images, labels, keys

    def _write_table(self, file: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        with HashingFile(self.root / file) as out:
            out.write(sink.getvalue())
        self.files[file] = (out.sha256, out.bytes)


def _check_texts(where: str, texts: Sequence[Any], or_none: bool = False) -> None:
    """Raises StorageError for anything but texts that a table can hold."""
    for text in texts:
        if not (text is None and or_none) and not (isinstance(text, str) and is_utf8(text)):
            raise StorageError(f"{where} is {shown(text)}: give a text (str) in UTF-8{' or None' if or_none else ''}")


class ImageDataset:
    """One split of a dataset of images, open for reading. Rows 0 to n - 1 are in the order in which they were read."""

    generation = None
    draws = 1
    noise_step = None
    remote = False

    def __init__(self, root: Path, split: str, body: Mapping[str, Any]) -> None:
        part = body["splits"][split]
        self.root = root
        self.name: str = body["name"]
        self.split = split
        self.image_shape: tuple[int, ...] = tuple(body["image_shape"])
        self.dtype: str = body.get("dtype", "uint8")
        self.image_scale: float | None = body.get("image_scale")
        self.image_decoder: str | None = body.get("image_decoder")
        self.image_shift: float | None = body.get("image_shift")
        self.classes: list[str] = list(body["classes"])
        low, high = body["value_range"]
        self.value_range: tuple[float, float] = (low, high)
        self.content_digest: str = body["digest"]
        self.order_key = order_key(f"{body['digest']}:{split}", part["rows"], 1)
        self._table = inside(root, part["table"])
        self._keys: pa.ChunkedArray | None = None
        self._captions: pa.ChunkedArray | None = None
        self.rows_per_shard: int = part["rows_per_shard"]
        files = [inside(root, shard["file"]) for shard in part["shards"]]
        records = [shard["records"] for shard in part["shards"]]
        fields, rows_per_block = _fields(self.image_shape, self.dtype), body["rows_per_block"]
        self._shards = ShardSequence(
            lambda number: MappedShard(files[number], fields, records[number], rows_per_block),
            fields,
            part["rows"],
            part["rows_per_shard"],
            rows_per_block,
            what=f"{root}: row",
            value_range=self.value_range,
        )

    @classmethod
    @checked()
    def open(cls, root: str | Path, split: str = "train") -> ImageDataset:
        """Opens a split.

        Raises StorageError if there is no such dataset or split, NewerSchema if a newer version wrote it.
        """
        root = local_path(root)
        body = read_record(root)
        if split not in body["splits"]:
            raise StorageError(f"{root / DATASET}: no split {split!r}, only {', '.join(body['splits'])}")
        return cls(root, split, body)

    def __len__(self) -> int:
        return len(self._shards)

    @checked()
    def images(self, rows: Rows) -> npt.NDArray[Any]:
        """The images at these rows: [n, C, H, W] in `dtype`, in the order of `rows`, which may be any."""
        return self._shards.gather(["image"], rows)["image"]

    @checked()
    def labels(self, rows: Rows) -> npt.NDArray[np.int64]:
        """The labels at these rows: int64 [n], -1 for data without classes."""
        return self._shards.gather(["label"], rows)["label"]

    @checked()
    def keys(self, rows: Rows) -> list[str]:
        """The names that the source gave to these rows."""
        check_inside(f"{self.root}: row", np.asarray(rows), len(self))
        if self._keys is None:
            self._keys = read_index(self._table, ["key"], len(self))["key"]
        return self._keys.take(pa.array(np.asarray(rows, np.int64))).to_pylist()

    @property
    def captioned(self) -> bool:
        """Whether the data has captions."""
        return CAPTION in read_index(self._table, None, len(self)).column_names

    @checked()
    def captions(self, rows: Rows) -> list[str | None]:
        """The captions at these rows, None where there is none; a text embedding of them can become a row field.

        Raises StorageError if the data was made without captions.
        """
        check_inside(f"{self.root}: row", np.asarray(rows), len(self))
        if self._captions is None:
            table = read_index(self._table, None, len(self))
            if CAPTION not in table.column_names:
                raise StorageError(f"{self._table}: the data has no captions; data.captions names their field")
            self._captions = table[CAPTION]
        return self._captions.take(pa.array(np.asarray(rows, np.int64))).to_pylist()

    @checked(images=instance("ndarray"))
    def to_float(self, images: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The images as float32 of the same shape. Pixels are scaled to `value_range`; floats keep their values."""
        if images.dtype != self.dtype:
            raise WrongArgument("images", f"are {images.dtype}, those of {self.root} are {self.dtype}: give its own")
        return to_float32(images, self.value_range)

    @checked(options=ReadOptions)
    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = None,
        *,
        shuffle: Shuffle = "full",
        window: int = 16,
        **options: Unpack[ReadOptions],
    ) -> BatchReader:
        """Batches without noise; endless by default. The options are those of `PairStore.batches`."""
        return BatchReader(StoreStream(self, seed, shuffle, window), batch_size, epochs, **options)

    @checked()
    def empty(self, records: int) -> Arrays:
        """Empty buffers for `gather`."""
        return self._shards.empty(["image", "label"], records)

    @checked()
    def gather(self, draw: int, rows: Rows, out: Arrays | None = None) -> Arrays:
        """The images and labels at these rows, as stored; in `out` if given, where images may be float32."""
        return self._shards.gather(["image", "label"], rows, out)

    @checked()
    def shard(self, draw: int, number: int) -> Shard:
        """A shard, mapped into memory."""
        return self._shards.shard(number)

    @checked()
    def row_field(self, name: str) -> Any:
        """Always raises StorageError: only pair stores have row-scoped fields."""
        raise StorageError(f"{self.root}: a dataset has no field {name!r}; add fields to a pair store")
