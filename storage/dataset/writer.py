"""Writes a dataset of images and labels, the output of the data stage, in shards: splits `train` and `heldout`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nfm.storage.dataset.record import DATASET, SPLIT_NAME, check_record
from nfm.storage.dataset.shards import CAPTION, ROWS_PER_BLOCK, ReadyShard, shard_writer
from nfm.storage.errors import StorageError, is_utf8
from nfm.storage.errors.arguments import checked, checked_later, numbers, shown, whole, wrong
from nfm.storage.files.atomic import HashingFile, hash_file, place, write_json
from nfm.storage.files.durable import StoredFile
from nfm.storage.files.paths import local_path
from nfm.storage.format import untrusted
from nfm.storage.format.fields import check_channels_first
from nfm.storage.format.spec import FORMAT

VALUE_RANGE = (-1.0, 1.0)
DTYPES = ("uint8", "float16", "float32")
_TABLE = pa.schema([("row", pa.int64()), ("key", pa.string()), ("label", pa.int64())])
_REJECTED = pa.schema([("key", pa.string()), ("reason", pa.string())])

Chunk = tuple[npt.NDArray[Any] | ReadyShard, npt.NDArray[np.int64], Sequence[str]]


class DatasetWriter:
    """Writes a dataset of images: write each split once, then call `close`, which writes dataset.json last.

    `classes` are the names of the labels 0, 1, ...; without classes every label is -1. `dtype` is the type of the
    images. If they are floats (latents), they are divided by `image_scale`, and `image_shift` is added, before
    `image_decoder` turns them into pictures. If an earlier writer was killed in this folder, writing starts from the
    beginning; a folder with a finished dataset is refused. `image_shape` is (C, H, W).
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
        check_channels_first(str(root), image_shape)
        if empty := [number for number, known in enumerate(classes) if not known.strip()]:
            raise StorageError(f"{root}: class {empty[0]} has no name; name each class")
        self.root = local_path(root)
        if self.root.exists() and not self.root.is_dir():
            raise StorageError(f"{self.root}: is a file, and the dataset is to be a folder; take another place")
        self._check_unfinished()
        self.files: dict[str, tuple[str, int]] = {}  # the tables: (sha256, bytes) by relative path
        self._name = name
        self._image_shape = tuple(image_shape)
        self._classes = list(classes)
        self._dtype = dtype
        self._about = {"image_scale": image_scale, "image_decoder": image_decoder, "image_shift": image_shift}
        self._rows_per_shard = rows_per_shard
        self._splits: dict[str, Any] = {}
        self._closed = False
        nothing = {"rows": 0, "rows_per_shard": rows_per_shard, "shards": [], "table": "train.parquet"}
        check_record(self.root / DATASET, self._record({"train": nothing}))  # fail now, not after hours of writing

    @checked(rows=whole(), chunks=checked_later, captions=checked_later)
    def write_split(
        self, split: str, rows: int, chunks: Iterable[Chunk], captions: Sequence[str | None] | None = None
    ) -> None:
        """Writes exactly `rows` records from chunks of (images [n, C, H, W], labels [n], keys [n]).

        In place of the images of a whole shard, a chunk may have a `ReadyShard`.

        `captions` are one text a record, None where there is none; they become a column of the split's table. Raises
        StorageError if the number of records, the shape or the dtype differs, if a label has no class, if a value is
        not finite, if a key comes twice, for a split that is written already, and after `close`.
        """
        self._check_new(split)
        pieces = self._pieces(split, chunks)
        piece, at, written, shards, tables = next(pieces, None), 0, 0, [], []
        for number in range(-(-rows // self._rows_per_shard)):
            file = f"{split}/s{number:05d}.tar"
            records = min(self._rows_per_shard, rows - written)
            ready = piece[0] if piece is not None and at == 0 else None
            if piece is not None and isinstance(ready, ReadyShard):
                _, labels, keys = piece
                if len(keys) != records:
                    raise StorageError(f"{ready.path}: {len(keys)} records, {file} takes {records}; run again")
                place(ready.path, self.root / file, ready.bytes, keep=True)
                tables.append(_rows_of(written, keys, labels))
                shards.append({"file": file, "records": records, "sha256": ready.sha256, "bytes": ready.bytes})
                written, piece = written + records, next(pieces, None)
                continue
            with shard_writer(self.root / file, split, number, records, self._image_shape, self._dtype) as shard:
                while shard.written < records and piece is not None:
                    images, labels, keys = piece
                    if isinstance(images, ReadyShard):
                        raise StorageError(f"{images.path}: {file} has other records already; run again")
                    end = min(len(keys), at + records - shard.written)
                    shard.append({"image": images[at:end], "label": labels[at:end]})
                    tables.append(_rows_of(written, keys[at:end], labels[at:end]))
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
        self._add_split(split, entries, _rows_of(0, keys, labels), captions)

    def _add_split(
        self, split: str, shards: list[dict[str, Any]], table: pa.Table, captions: Sequence[str | None] | None
    ) -> None:
        _check_once(f"{self.root}: {split}", table["key"])
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
        if not self._splits:
            raise StorageError(f"{self.root}: no split is written yet; write one, such as 'train', and close then")
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
        self._check_unfinished()  # by another writer, since this one began

    def _check_unfinished(self) -> None:
        if (self.root / DATASET).exists():
            raise StorageError(
                f"{self.root / DATASET}: a finished dataset is here, and is not written over; take another folder, or "
                "move this one away"
            )

    def _record(self, splits: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self._name,
            "image_shape": list(self._image_shape),
            "dtype": self._dtype,
            "value_range": list(VALUE_RANGE),
            "classes": self._classes,
            "rows_per_block": ROWS_PER_BLOCK,
            "splits": splits,
            **{key: value for key, value in self._about.items() if value is not None},
        }

    def _pieces(self, split: str, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        where = f"{self.root}: {split}"
        if not isinstance(chunks, Iterable):
            raise wrong("chunks", chunks, "chunks (images, labels, keys), in a list or a generator")
        for chunk in chunks:
            if (
                not isinstance(chunk, tuple | list)
                or len(chunk) != 3
                or not isinstance(chunk[0], np.ndarray | ReadyShard)
            ):
                raise StorageError(
                    f"{where} got {shown(chunk)} as a chunk: give (images, labels, keys), the images as a numpy array"
                )
            images, labels, keys = chunk
            labels = numbers(f"{where}: labels", labels)
            _check_texts(f"{where}: a key", keys)
            count = len(keys) if isinstance(images, ReadyShard) else len(images)
            if not count == len(labels) == len(keys):
                raise StorageError(
                    f"{self.root}: {split} got {count} images, {len(labels)} labels and {len(keys)} keys"
                )
            low, high = (0, len(self._classes) - 1) if self._classes else (-1, -1)
            outside = np.flatnonzero((labels < low) | (labels > high))
            if len(outside):
                raise StorageError(
                    f"{self.root}: {split} record {keys[outside[0]]!r} has label {labels[outside[0]]}, outside "
                    f"{low}..{high} (there are {len(self._classes)} classes)"
                )
            if (
                isinstance(images, np.ndarray)
                and images.dtype.kind == "f"
                and len(bad := np.flatnonzero(~np.isfinite(images).reshape(len(keys), -1).all(1)))
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
    if isinstance(texts, str | bytes):
        raise StorageError(f"{where} would be each letter of {shown(texts)}: give a list of texts")
    for text in texts:
        if not (text is None and or_none) and not (isinstance(text, str) and is_utf8(text)):
            raise StorageError(f"{where} is {shown(text)}: give a text (str) in UTF-8{' or None' if or_none else ''}")


def _check_once(where: str, keys: pa.ChunkedArray) -> None:
    """Raises StorageError for a key of two records: it would name neither."""
    if pc.count_distinct(keys).as_py() == len(keys):
        return
    counts = pc.value_counts(keys)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    key, count = twice[0]["values"].as_py(), twice[0]["counts"].as_py()
    raise StorageError(f"{where}: {count} records have the key {key!r}; give each record a key of its own")


def _rows_of(start: int, keys: Sequence[str], labels: npt.NDArray[np.int64]) -> pa.Table:
    return pa.table([np.arange(start, start + len(keys)), list(keys), labels], schema=_TABLE)
