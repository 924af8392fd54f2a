"""A shard as the stock readers see it: tarfile and numpy for the tar layouts, zarr for Zarr. No code of ours parses."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from nfm.storage.errors import CorruptShard, StorageError
from nfm.storage.format.spec import StoreSpec
from nfm.storage.layouts.zarr_metadata import chunk_path, documents
from nfm.storage.ledger.commits import Commit

Array = npt.NDArray[Any]


def check_stock_reader(spec: StoreSpec) -> None:
    """Raises StorageError when the stock reader of this layout is not installed."""
    if spec.layout == "zarr" and find_spec("zarr") is None:
        raise StorageError("the deep level reads with the package zarr, which is not here; install nfm-pairs[zarr]")


def stock_arrays(spec: StoreSpec, files: list[Path], commit: Commit) -> Iterator[tuple[str, Array]]:
    """(field, records [n, *shape]) of a shard, the records of each field in their order.

    Raises whatever a stock reader raises where it chokes, and CorruptShard for what it would not notice.
    """
    if spec.layout == "blocks":
        yield from _blocks(spec, files[0], commit)
    elif spec.layout == "samples":
        yield from _samples(spec, files[0], commit)
    else:
        yield from _zarr(spec, files, commit)


def _blocks(spec: StoreSpec, path: Path, commit: Commit) -> Iterator[tuple[str, Array]]:
    for name, data in _members(path):
        match = re.fullmatch(rf"{commit.name}-b\d{{5}}\.(\w+)\.npy", name)
        if match is None or not spec.has(match[1]):
            raise CorruptShard(f"the member {name!r} is no block of {commit.name}")
        yield match[1], _loaded(data)


def _samples(spec: StoreSpec, path: Path, commit: Commit) -> Iterator[tuple[str, Array]]:
    slot = -1
    for name, data in _members(path):
        match = re.fullmatch(rf"d{commit.draw:03d}-(\d{{9}})\.(?:(\w+)\.npy|cls)", name)
        if match is None or not spec.has(match[2] or "label"):
            raise CorruptShard(f"the member {name!r} is no record of {commit.name}")
        if int(match[1]) != slot:
            slot = int(match[1])
            yield "slot", np.array([slot])
        yield (match[2], _loaded(data)[None]) if match[2] else ("label", np.array([int(data)]))


def _zarr(spec: StoreSpec, files: list[Path], commit: Commit) -> Iterator[tuple[str, Array]]:
    """Reads through links in a folder of its own: files may wait to be sealed, or be copies of an object store's."""
    import zarr

    slots = spec.slots_of(commit.shard)
    with TemporaryDirectory(prefix="nfm-verify-") as scratch:
        for field, file in zip(spec.fields, files):
            folder = f"d{commit.draw:03d}/{field.name}"
            link = Path(scratch) / chunk_path(field, commit.draw, commit.shard)
            link.parent.mkdir(parents=True)
            link.symlink_to(file.resolve())
            (Path(scratch) / folder / "zarr.json").write_bytes(documents(spec, commit.draw + 1)[f"{folder}/zarr.json"])
            array = zarr.open_array(Path(scratch) / folder, mode="r")
            for start in range(slots.start, slots.stop, spec.rows_per_block):
                yield field.name, np.asarray(array[start : min(start + spec.rows_per_block, slots.stop)])


def _loaded(data: bytes) -> Array:
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise CorruptShard("a member is no npy file")
    return array


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    size = path.stat().st_size
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not 0 <= member.size <= size:
                raise CorruptShard(f"the member {member.name!r} is no plain file of this archive")
            yield member.name, cast("IO[bytes]", archive.extractfile(member)).read()
