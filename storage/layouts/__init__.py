"""The layouts of a shard, behind one interface: how it is written, which files it has, where a record lies."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from nfm.storage.errors import StorageError
from nfm.storage.files.atomic import content_digest, place, write_bytes
from nfm.storage.files.durable import StoredFile
from nfm.storage.files.paths import as_path, is_remote, several, size_of
from nfm.storage.files.paths import remove as remove_file
from nfm.storage.files.small_files import read_bytes
from nfm.storage.format.commit import ShardFiles
from nfm.storage.format.fields import Field
from nfm.storage.format.spec import StoreSpec, use_layouts
from nfm.storage.layouts.mapped import Shard
from nfm.storage.layouts.seeded import Made
from nfm.storage.layouts.tar_base import BlockWriter, Stock, Text
from nfm.storage.layouts.tar_blocks import Blocks
from nfm.storage.layouts.tar_samples import Samples
from nfm.storage.layouts.zarr import Zarr
from nfm.storage.layouts.zarr_writer import remove_folder

Array = npt.NDArray[Any]


class Layout(Protocol):
    """How the records of a shard lie in its files. A new layout is one file with such an object, and a line in
    `LAYOUTS`.

    The payload of a shard is a tar. If `by_field`, it is a folder with one file for each field, which sealing moves to
    its final place. Without `holes` a sealed store must have every shard.
    """

    @property
    def by_field(self) -> bool: ...

    @property
    def holes(self) -> bool: ...

    def writer(self, spec: StoreSpec, path: Path, name: str) -> BlockWriter:
        """Begins to write the shard `name`."""
        ...

    def mapped(self, spec: StoreSpec, paths: Sequence[Path], records: int) -> Shard:
        """Maps a shard from its local files. Raises MissingShard or CorruptShard."""
        ...

    def offsets(self, fields: Sequence[Field], records: Array, rows: Array, rows_per_block: int) -> dict[str, Array]:
        """The byte offset of row rows[i] in a shard of records[i] records: int64 [n] for each field.

        A field that follows from the position is left out.
        """
        ...

    def text(self, name: str) -> Text | None:
        """How to parse a field that is stored as text; None for a field of numbers."""
        ...

    def shard_bytes(self, spec: StoreSpec, records: int) -> int:
        """Size in bytes of the files of a shard."""
        ...

    def check(self, spec: StoreSpec) -> None:
        """Raises StorageError for sizes that the layout does not allow."""
        ...

    def rows_per_block(self, spec: StoreSpec) -> int:
        """The records of a block, if pairs of this recipe are converted to this layout."""
        ...

    def placed(self, spec: StoreSpec, name: str) -> list[str]:
        """Where sealing puts the files of a shard, relative to the store; empty if they stay where they are."""
        ...

    def metadata(self, spec: StoreSpec, draws: int) -> dict[str, bytes]:
        """The extra files of a sealed store for stock readers, by relative path, byte for byte."""
        ...

    def stock_arrays(self, spec: StoreSpec, files: Sequence[Path], draw: int, shard: int) -> Stock:
        """(field, records [n, *shape]) of a shard as stock readers see it; the records of a field come in order.

        None of our code parses here. Raises what the stock readers raise, and CorruptShard for faults that they would
        miss.
        """
        ...

    def check_stock_reader(self) -> None:
        """Raises StorageError if the package that reads stock arrays is not installed."""
        ...


LAYOUTS: dict[str, Layout] = {"blocks": Blocks(), "samples": Samples(), "zarr": Zarr()}
use_layouts(LAYOUTS)


def of(spec: StoreSpec) -> Layout:
    """The layout of a store."""
    return LAYOUTS[spec.layout]


def payload_name(spec: StoreSpec, name: str, attempt: str) -> str:
    """Where an attempt writes its shard, relative to the store: a tar, or a folder with one file for each field."""
    return f"shards/{name}.{attempt}" + ("" if of(spec).by_field else ".tar")


def writer(spec: StoreSpec, root: Path, name: str, attempt: str) -> BlockWriter:
    """Begins to write the shard `name` under the name of an attempt."""
    return of(spec).writer(spec, root / payload_name(spec, name, attempt), name)


def closed(writer: BlockWriter, payload: str) -> tuple[StoredFile, tuple[StoredFile, ...]]:
    """Makes a shard durable. Returns (the whole payload, its parts by field if it is several files).

    Their paths are relative to the store, in which `payload` is the shard that is written.
    """
    found = writer.close()
    if found[0].path == str(writer.path):
        return replace(found[0], path=payload), ()
    parts = tuple(replace(file, path=f"{payload}/{posixpath.basename(file.path)}") for file in found)
    whole = content_digest(part.sha256 for part in parts)
    return StoredFile(payload, whole, sum(part.bytes for part in parts)), parts


def files(spec: StoreSpec, shard: ShardFiles, sealed: bool = True) -> list[StoredFile]:
    """The payload files of a shard in the order of the fields.

    With `sealed=False` the paths are those where its attempt wrote them; some layouts move files when sealing. Raises
    StorageError if the files do not fit the layout of the spec.
    """
    name, payload, parts = shard.name, shard.payload, shard.parts
    if not of(spec).by_field:
        if parts or not payload.path.endswith(".tar"):
            raise StorageError(
                f"{name}: {payload.path} is no shard of layout {spec.layout}; run `nfm audit` on its store"
            )
        return [payload]
    if [part.path for part in parts] != [f"{payload.path}/{field.name}" for field in spec.stored]:
        raise StorageError(f"{name}: {payload.path} has not one file a field of the spec; run `nfm audit` on its store")
    return [replace(part, path=path) for path, part in zip(of(spec).placed(spec, name), parts)] if sealed else [*parts]


def present(root: Path, spec: StoreSpec, shard: ShardFiles) -> list[StoredFile]:
    """The payload files of a shard where they are: sealed, or until that is done where their attempt wrote them."""
    pairs = zip(files(spec, shard), files(spec, shard, sealed=False))
    return [final if size_of(root / final.path) is not None else staged for final, staged in pairs]


def missing(root: str | Path, spec: StoreSpec, shard: ShardFiles) -> list[tuple[Path, int, int | None]]:
    """The payload files that are neither where they were written nor sealed: (path, bytes committed, bytes found)."""
    root, found = as_path(root), []
    for staged, final in zip(files(spec, shard, sealed=False), files(spec, shard)):
        sizes = [size_of(root / path) for path in dict.fromkeys((staged.path, final.path))]
        if staged.bytes not in sizes:
            found.append((root / staged.path, staged.bytes, max((s for s in sizes if s is not None), default=None)))
    return found


def remove(root: Path, payload: StoredFile, parts: Sequence[StoredFile]) -> None:
    """Removes what an attempt has written: a tar, or a folder and its parts."""
    for file in parts or (payload,):
        remove_file(root / file.path)
    if parts:
        remove_folder(root / payload.path)


def seal(root: str | Path, spec: StoreSpec, draws: int, shards: Sequence[ShardFiles]) -> None:
    """Moves committed files to where stock readers look for them, and adds their metadata, if the layout does that.

    It may be repeated, and killed at any point. Files of earlier generations stay unchanged.
    """
    if not of(spec).by_field:
        return
    root = as_path(root)

    def put_in_place(shard: ShardFiles) -> None:
        for staged, final in zip(files(spec, shard, sealed=False), files(spec, shard)):
            place(root / staged.path, root / final.path, final.bytes)
        remove_folder(root / shard.payload.path)

    several(root, put_in_place, shards)
    for path, data in of(spec).metadata(spec, draws).items():
        if size_of(root / path) != len(data) or read_bytes(root / path, root=root) != data:
            write_bytes(root / path, data)


def open_shard(spec: StoreSpec, paths: Sequence[Path], records: int) -> Shard:
    """Opens a shard from its local files, in the order of `files`. Raises MissingShard or CorruptShard."""
    for path in paths:
        if is_remote(path):
            raise StorageError(f"{path}: a shard is mapped from a local file; fetch it first")
    shard = of(spec).mapped(spec, paths, records)
    shard.made = Made.of(spec)
    return shard
