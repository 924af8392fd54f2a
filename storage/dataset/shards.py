"""The shards of a dataset of images: what a record has, and a shard's file written and mapped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nfm.storage.format.fields import Field
from nfm.storage.layouts.tar_blocks import MappedShard, ShardWriter

ROWS_PER_BLOCK = 256
CAPTION = "caption"  # a column of a split's table that only data with captions has


@dataclass(frozen=True)
class ReadyShard:
    """A shard that was written before as it has to be: its file gets a second name, and its images are not read."""

    path: Path
    sha256: str
    bytes: int


def fields_of(image_shape: tuple[int, ...], dtype: str) -> tuple[Field, ...]:
    return Field("image", dtype, image_shape, "image"), Field("label", "int64", (), "label")


def shard_writer(
    path: Path, split: str, number: int, records: int, image_shape: tuple[int, ...], dtype: str
) -> ShardWriter:
    """A writer of shard `number` of a split, at any path."""
    return ShardWriter(path, fields_of(image_shape, dtype), records, f"{split}-s{number:05d}", ROWS_PER_BLOCK)


def written_shard(path: Path, records: int, image_shape: tuple[int, ...], dtype: str) -> MappedShard:
    """What `shard_writer` wrote, mapped into memory."""
    return MappedShard(path, fields_of(image_shape, dtype), records, ROWS_PER_BLOCK)
