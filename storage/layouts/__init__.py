"""The layouts of a shard, behind one interface: how it is written, which files it has, where a record lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from nfm.storage.errors import StorageError
from nfm.storage.files.atomic import content_digest, place, write_bytes
from nfm.storage.files.paths import as_path, is_remote, several, size_of
from nfm.storage.files.paths import remove as remove_file
from nfm.storage.files.small_files import read_bytes
from nfm.storage.format.spec import Field, StoreSpec, parse_name
from nfm.storage.layouts import blocks, samples, zarr_metadata, zarr_shard, zarr_writer
from nfm.storage.layouts.tar import Mapped, Payload

if TYPE_CHECKING:
    from nfm.storage.ledger.commits import Commit

Array = npt.NDArray[Any]
Entry = Mapping[str, Any]  # a shard in a manifest


class Shard(Protocol):
    """A shard open for reading, mapped where its layout allows it."""

    records: int
    fields: tuple[Field, ...]
    addresses: dict[str, int]  # where the mapped file of a field begins in this process's memory
    maps: list[Mapped]  # of all files

    def read(self, name: str, start: int, stop: int) -> Array:
        """Records start to stop of one field as stored, as a new array [stop - start, *shape]."""
        ...


class Writer(Protocol):
    """A shard being written: a context manager that leaves nothing behind on an error."""

    @property
    def path(self) -> Path: ...

    @property
    def written(self) -> int:
        """Records so far."""
        ...

    def append(self, arrays: Mapping[str, Array]) -> None:
        """Adds n records: for every field an array [n, *shape] of the field's dtype, and no other names."""
        ...

    def close(self) -> Any: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...


@dataclass(frozen=True)
class StoredFile:
    """A file of a shard: its path relative to the store, SHA-256 (hex) and size in bytes."""

    path: str
    sha256: str
    bytes: int


def payload_name(spec: StoreSpec, name: str, attempt: str) -> str:
    """Where an attempt writes its shard, relative to the store: a tar, or the folder of the fields' files."""
    return f"shards/{name}.{attempt}" + ("" if spec.layout == "zarr" else ".tar")


def writer(spec: StoreSpec, root: Path, name: str, attempt: str) -> Writer:
    """Begins to write the shard `name` under an attempt's name."""
    path, (draw, shard) = root / payload_name(spec, name, attempt), parse_name(name)
    slots = spec.slots_of(shard)
    if spec.layout == "samples":
        return samples.SampleWriter(path, spec.fields, len(slots), draw, slots.start)
    if spec.layout == "zarr":
        rows = (spec.rows_per_shard, spec.rows_per_block)
        return zarr_writer.ZarrWriter(path, spec.fields, len(slots), *rows, compressed(spec))
    return blocks.ShardWriter(path, spec.fields, len(slots), name, spec.rows_per_block)


def closed(writer: Writer) -> tuple[Payload, tuple[dict[str, Any], ...]]:
    """Makes a shard durable: (the payload as a whole, its parts by field where it is several files)."""
    found = writer.close()
    if isinstance(found, Payload):
        return found, ()
    parts = tuple({"field": file.path.name, "sha256": file.sha256, "bytes": file.bytes} for file in found)
    whole = content_digest(part["sha256"] for part in parts)
    return Payload(writer.path, whole, sum(part["bytes"] for part in parts)), parts


def files(spec: StoreSpec, entry: Entry | Commit, sealed: bool = True) -> list[StoredFile]:
    """The payload files of a shard in the order of the fields, from its commit or from its entry of a manifest.

    With `sealed=False` where its attempt wrote them; sealing moves those of layout zarr. Raises StorageError when
    they are not those of the spec's layout.
    """
    name, payload, sha256, size, parts = _described(entry)
    if spec.layout != "zarr":
        if parts or not payload.endswith(".tar"):
            raise StorageError(f"{name}: {payload} is no shard of layout {spec.layout}; run `nfm audit` on its store")
        return [StoredFile(payload, sha256, size)]
    if [part["field"] for part in parts] != [field.name for field in spec.fields]:
        raise StorageError(f"{name}: {payload} has not one file a field of the spec; run `nfm audit` on its store")
    paths = placed(spec, name) if sealed else [f"{payload}/{field.name}" for field in spec.fields]
    return [StoredFile(path, part["sha256"], part["bytes"]) for path, part in zip(paths, parts)]


def placed(spec: StoreSpec, name: str) -> list[str]:
    """Where sealing puts the files of a shard, relative to the store; nowhere when they stay where they are."""
    draw, shard = parse_name(name)
    return [zarr_metadata.chunk_path(field, draw, shard) for field in spec.fields] if spec.layout == "zarr" else []


def _described(entry: Entry | Commit) -> tuple[str, str, str, int, Sequence[Mapping[str, Any]]]:
    if isinstance(entry, Mapping):
        return entry["name"], entry["payload"], entry["sha256"], entry["bytes"], entry.get("parts", ())
    return entry.name, entry.payload, entry.payload_sha256, entry.payload_bytes, entry.parts


def missing(root: str | Path, spec: StoreSpec, entry: Entry | Commit) -> list[tuple[Path, int, int | None]]:
    """The payload files that are neither where they were written nor sealed: (path, bytes committed, bytes found)."""
    root, found = as_path(root), []
    for staged, final in zip(files(spec, entry, sealed=False), files(spec, entry)):
        sizes = [size_of(root / path) for path in dict.fromkeys((staged.path, final.path))]
        if staged.bytes not in sizes:
            found.append((root / staged.path, staged.bytes, max((s for s in sizes if s is not None), default=None)))
    return found


def remove(payload: Path, parts: Sequence[Mapping[str, Any]]) -> None:
    """Removes what an attempt has written: a tar, or a folder and its parts."""
    if not parts:
        remove_file(payload)
        return
    for part in parts:
        remove_file(payload / part["field"])
    zarr_writer.remove_folder(payload)


def seal(root: str | Path, spec: StoreSpec, draws: int, entries: Sequence[Entry | Commit]) -> None:
    """Puts committed files where stock readers look for them, and describes them there: layout zarr alone needs it.

    Idempotent, and may be killed at any point; files of earlier generations stay as they are.
    """
    if spec.layout != "zarr":
        return
    root = as_path(root)

    def put_in_place(entry: Entry | Commit) -> None:
        for staged, final in zip(files(spec, entry, sealed=False), files(spec, entry)):
            place(root / staged.path, root / final.path, final.bytes)
        zarr_writer.remove_folder(root / _described(entry)[1])

    several(root, put_in_place, entries)
    for path, data in metadata(spec, draws).items():
        if size_of(root / path) != len(data) or read_bytes(root / path, root=root) != data:
            write_bytes(root / path, data)


def metadata(spec: StoreSpec, draws: int) -> dict[str, bytes]:
    """The files that a sealed store has for stock readers beside its shards, by relative path, byte for byte."""
    return zarr_metadata.documents(spec, draws) if spec.layout == "zarr" else {}


def compressed(spec: StoreSpec) -> tuple[str, ...]:
    """The fields that are compressed, and so can be read but not gathered."""
    return ("noise",) if spec.codec == "pcodec" else ()


def open_shard(spec: StoreSpec, paths: Sequence[Path], records: int) -> Shard:
    """Opens a shard from its files, in the order of `files`; they are local. Raises MissingShard or CorruptShard."""
    for path in paths:
        if is_remote(path):
            raise StorageError(f"{path}: a shard is mapped from a local file; fetch it first")
    if spec.layout == "samples":
        return samples.MappedSamples(paths[0], spec.fields, records)
    if spec.layout == "zarr":
        rows = (spec.rows_per_shard, spec.rows_per_block)
        return zarr_shard.MappedZarr(paths, spec.fields, records, *rows, compressed(spec))
    return blocks.MappedShard(paths[0], spec.fields, records, spec.rows_per_block)


def offsets(
    layout: str, fields: Sequence[Field], records: Array, rows: Array, rows_per_block: int
) -> dict[str, npt.NDArray[np.int64]]:
    """Where row rows[i] of a shard of records[i] records begins in the file of a field: int64 [n] by field.

    A field that is implied by the position has none.
    """
    if layout == "samples":
        return samples.record_offsets(fields, rows)
    if layout == "zarr":
        return zarr_shard.record_offsets(fields, rows, rows_per_block)
    return blocks.record_offsets(fields, records, rows, rows_per_block)
