"""Parquet files of encoded images, as Hugging Face's image data sets lie in repositories and `to_parquet` writes them.

An image is a struct of bytes and path, or plain bytes. docs/data.md says what is read, what is set aside, and why.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nfm.stages.base import Reporter, StageError, Unfit
from nfm.stages.data.reading.labels import NO_LABEL, whole_numbers
from nfm.stages.data.source import check_texts, check_unpacked
from nfm.stages.data.sources.encoded import EncodedImages, Listing, Piece
from nfm.stages.data.sources.parquet_columns import Columns, columns_of
from nfm.storage.errors import legible

BATCH_BYTES = 32 << 20  # of encoded images in memory at a time
MOST_ROWS = 1024  # images at a time
BUFFER = 1 << 20  # bytes of a column that are read at a time


class Parquet(EncodedImages):
    """One file, those of a folder, or those of a pattern. Keys are the name of the file and the number of the row.

    `images`, `labels` and `captions` name the columns; labels "" means none.
    """

    name, ending, anywhere = "parquet", ".parquet", False
    _columns: Columns | None = None  # of the first file that was listed

    def listed(self) -> Listing:
        keys: list[str] = []
        counts: list[int] = []
        labels: list[np.ndarray] = []
        captions: list[str | None] = []
        problems: dict[int, str] = {}
        for number, path in enumerate(self.files.paths):
            with self._opened(number) as file:
                columns = columns_of(path, file.schema_arrow, *self._wanted)
                first = self._columns or columns
                self._columns, self._images = first, first.images
                if columns.kind != first.kind:
                    raise StageError(
                        f"{path}: holds {columns.told(first)}, {self.files.names[0]} holds {first.told(columns)}: "
                        "all files must agree, save them anew with the same columns and classes"
                    )
                count = file.metadata.num_rows
                if columns.labels:
                    values, lacking = _labels(path, file, columns.labels)
                    labels.append(values)
                    problems |= {len(keys) + row: "its label is null" for row in lacking}
                if columns.captions:
                    captions += file.read([columns.captions])[columns.captions].to_pylist()
                counts.append(count)
                keys += [f"{self.files.stem(number)}/{row:07d}" for row in range(count)]
        found = np.concatenate(labels) if first.labels else None
        unlabelled = found is not None and len(found) > 0 and not (found != NO_LABEL).any()  # as hidden test sets are
        return Listing(
            keys,
            np.repeat(np.arange(len(counts)), counts),
            np.concatenate([np.arange(count) for count in counts]),
            {} if unlabelled else problems,
            found,
            captions if first.captions else None,
            None if unlabelled else self._names(first),
        )

    def about(self) -> dict[str, Any]:
        return super().about() | {"images": self._images}

    def recall(self, about: Mapping[str, Any]) -> None:
        super().recall(about)
        self._images = about["images"]

    def pieces(self, number: int, places: np.ndarray, sizes: np.ndarray) -> Iterator[Piece]:
        name, path = self._images, self.files.paths[number]
        start = 0  # the first row of the batch, in the file
        with self._opened(number) as file:
            for group in range(file.metadata.num_row_groups):
                about = file.metadata.row_group(group)
                if not np.any((start <= places) & (places < start + about.num_rows)):
                    start += about.num_rows
                    continue
                for batch in file.iter_batches(_rows_at_a_time(path, about, name), [group], [name]):
                    part = slice(*np.searchsorted(places, [start, start + len(batch)]).tolist())
                    if part.start < part.stop:
                        yield part, _Images(batch.column(0), places - start)
                    start += len(batch)

    def tell(self, report: Reporter) -> None:
        assert self._columns is not None
        if self._wanted[2] is None and self._columns.texts:
            texts = ", ".join(self._columns.texts)
            report.say(f"{self.files.path}: no captions are kept; data.captions names their column, such as {texts}")
        if self.listing.captions and (without := self.listing.captions.count(None)):
            report.say(f"{self.files.path}: {without:,} of {len(self.keys):,} rows have no caption")

    def _names(self, columns: Columns) -> Sequence[str] | None:
        """The names of classes in the schema, which data.classes may replace one by one."""
        given = self._given_classes
        if columns.names is not None:
            check_texts(f"{self.files.path}: a class of column {columns.labels!r}", columns.names)
            if given is not None and len(given) != len(columns.names):
                raise Unfit(
                    f"{self.files.path}: its schema names {len(columns.names)} classes, data.classes {len(given)}: "
                    "name as many, or leave it out"
                )
            if given is not None and tuple(given) != columns.names and sorted(given) == sorted(columns.names):
                raise Unfit(
                    f"{self.files.path}: its schema has these classes in another order, {', '.join(columns.names)}, "
                    "which says what its numbers mean: leave data.classes out"
                )
            if self._first:
                raise Unfit(
                    f"data.first_label = {self._first}: the schema of {self.files.path} names the classes of its "
                    "numbers, from 0 on: leave it out"
                )
        return columns.names

    @contextmanager
    def _opened(self, number: int) -> Iterator[pq.ParquetFile]:
        """A file, read in small pieces of a column. Raises StageError, naming it, for damage found on the way."""
        path = self.files.paths[number]
        with self.files.open(number) as raw:
            try:
                with pq.ParquetFile(raw, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True) as file:
                    yield file
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                said = legible(" ".join(str(error).split()))
                raise StageError(
                    f"{path}: cannot be read as Parquet ({said}): fetch it anew, or take it away"
                ) from error


class _Images:
    """The images of a batch as files that Pillow opens. `places` are the rows wanted, from the batch's first on."""

    def __init__(self, column: pa.Array, places: np.ndarray):
        self._places = places
        self._struct = pa.types.is_struct(column.type)
        self._column = column

    def __call__(self, at: int) -> io.BytesIO:
        from nfm.stages.data.reading.pixels import MisfitError

        found = self._column[int(self._places[at])]
        if not found.is_valid:
            raise MisfitError("its image is null")
        if self._struct and not (content := found["bytes"]).is_valid:
            path = found["path"].as_py() if "path" in found else None
            raise MisfitError(
                f"no bytes of the image, only the path {path!r}: put the bytes in with embed_external_files"
            )
        return io.BytesIO((content if self._struct else found).as_buffer())


def _rows_at_a_time(path: Path, group: Any, name: str) -> int:
    """As many rows as fit into BATCH_BYTES. Refuses a column that unpacks to far more than it has."""
    packed = unpacked = 0
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema.split(".")[0] == name:
            packed, unpacked = packed + column.total_compressed_size, unpacked + column.total_uncompressed_size
    check_unpacked(path, packed, unpacked)
    return max(1, min(MOST_ROWS, BATCH_BYTES * group.num_rows // max(unpacked, 1)))


def _labels(path: Path, file: pq.ParquetFile, name: str) -> tuple[np.ndarray, list[int]]:
    """The labels as the file has them, int64 [N], NO_LABEL where they are null, and the rows where they are."""
    column = file.read([name])[name].combine_chunks()
    there = column.is_valid().to_numpy(zero_copy_only=False)
    present = column.drop_null().to_numpy(zero_copy_only=False)
    values = np.zeros(len(column), present.dtype)
    values[there] = present
    labels = whole_numbers(values, len(values), f"{path}: column {name!r}")
    labels[~there] = NO_LABEL
    return labels, np.flatnonzero(~there).tolist()
