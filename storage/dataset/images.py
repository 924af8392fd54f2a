"""One split of a dataset of images (uint8, or floats such as latents) and labels, open for reading."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nfm.storage.dataset.record import DATASET, read_record
from nfm.storage.dataset.shards import CAPTION, fields_of
from nfm.storage.errors import StorageError, check_inside
from nfm.storage.errors.arguments import WrongArgument, checked, instance
from nfm.storage.files.paths import inside, local_path
from nfm.storage.format.convert import to_float32
from nfm.storage.format.index import read_index
from nfm.storage.format.order import Rows, Shuffle, order_key
from nfm.storage.layouts import Shard
from nfm.storage.layouts.tar_blocks import MappedShard
from nfm.storage.reading.gathering.shards import ShardSequence
from nfm.storage.reading.reader import BatchReader, ReadOptions
from nfm.storage.reading.stream import Arrays, StoreStream


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
        fields, rows_per_block = fields_of(self.image_shape, self.dtype), body["rows_per_block"]
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
