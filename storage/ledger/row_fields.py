"""Row-scoped fields: one value for each source row (a caption embedding), added to a finished store.

They are joined to records by image row.

    fields/<name>/s00000.<attempt>.npy    plain npy 1.0 files of `rows_per_file` rows each
    fields/<name>/field.json              written last, only if absent: dtype, shape, rows, the files with their SHA-256
"""

from __future__ import annotations

import math
import mmap
import re
import secrets
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from nfm.storage.errors import CorruptShard, MissingShard, Misused, StorageError, Unusual, by, check_inside
from nfm.storage.errors.arguments import WrongArgument, checked, checked_later, whole, writable, wrong
from nfm.storage.files.atomic import HashingFile, create_json, read_json
from nfm.storage.files.durable import StoredFile
from nfm.storage.files.paths import as_path, inside, is_remote, names_in, remove
from nfm.storage.files.small_files import plain
from nfm.storage.format import untrusted
from nfm.storage.format.fields import OF_BATCHES
from nfm.storage.format.spec import FORMAT, check_format, read_spec
from nfm.storage.layouts.npy import NPY_HEADER, npy_header

if TYPE_CHECKING:
    from nfm.storage.files.copies.cache import ShardCache

Array = npt.NDArray[Any]
T = TypeVar("T")
FIELDS, FIELD = "fields", "field.json"
_NAME = r"[a-z][a-z0-9_]{0,62}"
_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
_MOST_AXES, _MOST_FILES = 8, 100_000
_FILE_BYTES = 256 << 20
_MOST_OPEN = 64


class RowField:
    """A field of a store, mapped into memory: `gather` joins it to source rows.

    Files of a URL are fetched to `cache`.
    """

    def __init__(self, folder: Path, body: Mapping[str, Any], cache: ShardCache | None = None) -> None:
        self.folder = folder
        self.name: str = body["name"]
        self.dtype: np.dtype[Any] = np.dtype(body["dtype"])
        self.shape: tuple[int, ...] = tuple(body["shape"])
        self.rows: int = body["rows"]
        self.rows_per_file: int = body["rows_per_file"]
        below = f"{FIELDS}/{self.name}"
        self.files = tuple(StoredFile(f"{below}/{f['file']}", f["sha256"], f["bytes"]) for f in body["files"])
        self.body = dict(body)
        self._cache = cache
        self._maps: OrderedDict[int, Array] = OrderedDict()

    @classmethod
    @checked()
    def open(cls, root: str | Path, name: str, cache: ShardCache | None = None) -> RowField:
        """The field `name` of the store at `root`. Raises StorageError if there is none, or NewerSchema."""
        folder = _folder(root, name)
        if FIELD not in names_in(inside(as_path(root), f"{FIELDS}/{name}")):
            known = ", ".join(row_field_names(root)) or "none"
            raise StorageError(f"{folder}: no field {name!r} (there are: {known}); `nfm pairs add-field` adds one")
        return cls(folder, _checked(as_path(root), name), cache)

    @checked(out=checked_later)
    def gather(self, rows: npt.ArrayLike, out: Array | None = None) -> Array:
        """The values at these source rows ([n] integers, in any order) as [n, *shape], in `out` if given.

        Raises OutOfRange for a row that does not exist, MissingShard or CorruptShard (naming the file) for a bad file.
        """
        wanted = np.asarray(rows, np.int64)
        if out is None:
            out = np.empty((len(wanted), *self.shape), self.dtype)
        writable("out", out, (len(wanted), *self.shape), [self.dtype])
        if not len(wanted):
            return out
        check_inside(f"field {self.name!r}: row", wanted, self.rows)
        number, row = np.divmod(wanted, self.rows_per_file)
        touched = np.unique(number)
        if len(touched) == 1:
            np.take(self._file(int(touched[0])), row, axis=0, out=out, mode="clip")
            return out
        for file in touched.tolist():
            here = number == file
            out[here] = self._file(file)[row[here]]
        return out

    @checked(rows=whole(1))
    def chunks(self, rows: int = 4096) -> Iterator[Array]:
        """All values in the order of rows, some at a time."""
        for start in range(0, self.rows, rows):
            yield self.gather(np.arange(start, min(start + rows, self.rows)))

    def opened(self, file: StoredFile, opener: Callable[[Path], T]) -> T:
        """Calls `opener` with one of the field's files, which is first fetched and checked if the store is a URL.

        Raises MissingShard, naming the file.
        """
        root = self.folder.parent.parent
        try:
            if not is_remote(root):
                return opener(inside(root, file.path))
            from nfm.storage.files.copies.cache import default_cache

            return (self._cache or default_cache()).opened(root, [file], lambda paths: opener(paths[0]))
        except FileNotFoundError as error:
            raise MissingShard(
                f"{root / file.path}: a file of field {self.name!r} is missing; restore it from a copy"
            ) from error

    def _file(self, number: int) -> Array:
        found = self._maps.pop(number, None)
        if found is None:
            rows = min(self.rows_per_file, self.rows - number * self.rows_per_file)
            found = self._open_file(self.files[number], rows)
            while len(self._maps) >= _MOST_OPEN:
                self._maps.popitem(last=False)
        self._maps[number] = found
        return found

    def _open_file(self, file: StoredFile, rows: int) -> Array:
        path, shape = self.folder.parent.parent / file.path, (rows, *self.shape)
        try:
            buffer = self.opened(file, _mapped)
        except (OSError, ValueError) as error:
            raise CorruptShard(f"{path}: cannot be mapped ({error}); restore it from a copy") from error
        if len(buffer) != file.bytes or buffer[:NPY_HEADER] != npy_header(self.name, self.dtype, shape):
            raise CorruptShard(f"{path}: not {rows} rows of {self.dtype} {by(self.shape)}; restore it from a copy")
        return np.ndarray(shape, self.dtype, buffer, NPY_HEADER)


def _mapped(path: Path) -> mmap.mmap:
    with plain(path) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@checked()
def row_field_names(root: str | Path) -> list[str]:
    """The names of the fields of the store at `root`, sorted. Unfinished ones (without a field.json) are left out."""
    folder = inside(as_path(root), FIELDS)
    names = [name for name in names_in(folder) if re.fullmatch(_NAME, name)]
    return [name for name in names if FIELD in names_in(inside(as_path(root), f"{FIELDS}/{name}"))]


@checked(rows=whole(1, or_none="the records of a draw"), chunks=checked_later)
def write_row_field(
    root: str | Path,
    name: str,
    chunks: Iterable[Array],
    shape: tuple[int, ...],
    dtype: str,
    rows: int | None = None,
    file_bytes: int = _FILE_BYTES,
) -> RowField:
    """Adds a field to a finished store from arrays [n, *shape] in the order of source rows; durable on return.

    `rows` is the total number of rows (default: the records of a draw). If it is killed, readers see no new field.
    Raises StorageError for a wrong number of rows, shape or dtype, for a store of generated images, and if the store
    has a field of this name with other values; a field never changes. Warns of rows that have no finite value: readers
    give them as they are.
    """
    spec, folder = read_spec(root), _folder(root, name)
    if spec.student is not None:
        raise Misused(
            f"{folder}: field {name!r}: the images of coupling {spec.coupling!r} are generated, so that values of "
            "source rows are not theirs; add fields to a store of another coupling"
        )
    if name in OF_BATCHES or spec.has(name):
        raise WrongArgument("name", f"is {name!r}, an array that every batch has of its own: choose another name")
    if dtype not in _DTYPES:
        raise WrongArgument("dtype", f"of field {name!r} is {dtype!r}: it must be one of {', '.join(_DTYPES)}")
    if 0 in shape:
        raise WrongArgument("shape", f"of field {name!r} is {by(shape)}, no value at all: every size is at least 1")
    kind, shape, expected = _stored(name, dtype), tuple(int(size) for size in shape), rows or spec.rows
    per_row = kind.itemsize * math.prod(shape)
    rows_per_file = max(1, min(expected, file_bytes // max(per_row, 1)))
    created, attempt = False, secrets.token_hex(4)
    try:
        counted = _Finite(chunks)
        files = list(_write_files(folder, name, counted, shape, kind, expected, rows_per_file, attempt))
        body = {
            "format": FORMAT,
            "name": name,
            "dtype": kind.name,
            "shape": list(shape),
            "rows": expected,
            "rows_per_file": rows_per_file,
            "files": files,
        }
        created = publish_row_field(folder, body)
    finally:
        if not created:  # an error, or the same field was added before
            for path in (folder / file for file in names_in(folder) if f".{attempt}." in file):
                remove(path)
    if created and counted.none:
        warnings.warn(
            f"field {name!r}: {counted.none:,} of {expected:,} rows have no finite value, and readers give them as "
            "they are; if that is a mistake, remove the field's folder and add it again",
            Unusual,
            stacklevel=3,
        )
    return RowField.open(root, name)


class _Finite:
    """The chunks of a field, and after them how many of its rows have `none` but NaN and infinite values."""

    def __init__(self, chunks: Iterable[Array]) -> None:
        self._chunks, self.none = chunks, 0

    def __iter__(self) -> Iterator[Array]:
        for chunk in self._chunks:
            yield chunk
            if chunk.dtype.kind == "f":
                self.none += int(np.count_nonzero(~np.isfinite(chunk.reshape(len(chunk), -1)).any(axis=1)))


def publish_row_field(folder: Path, body: Mapping[str, Any]) -> bool:
    """Makes a field exist. Returns False if the same field already exists. Raises StorageError if another one does."""
    if create_json(folder / FIELD, body):
        return True
    there = _checked(folder.parent.parent, body["name"])
    if [part["sha256"] for part in there["files"]] != [part["sha256"] for part in body["files"]]:
        raise WrongArgument("name", f"is {body['name']!r}: {folder} has other values, and stays; choose another name")
    return False


def _write_files(
    folder: Path,
    name: str,
    chunks: Iterable[Array],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    rows: int,
    rows_per_file: int,
    attempt: str,
) -> Iterator[dict[str, Any]]:
    pieces = _pieces(folder, name, chunks, shape, dtype)
    piece = next(pieces, None)
    for number, start in enumerate(range(0, rows, rows_per_file)):
        records, written = min(rows_per_file, rows - start), 0
        file = f"s{number:05d}.{attempt}.npy"
        with HashingFile(folder / file, replace=False) as out:
            out.write(npy_header(name, dtype, (records, *shape)))
            while written < records:
                if piece is None:
                    raise StorageError(f"field {name!r}: {start + written} rows were given, the source has {rows}")
                taken = piece[: records - written]
                out.write(taken.reshape(-1).view(np.uint8).data)
                written += len(taken)
                piece = piece[len(taken) :] if len(taken) < len(piece) else next(pieces, None)
        yield {"file": file, "rows": records, "sha256": out.sha256, "bytes": out.bytes}
    if piece is not None:
        raise StorageError(f"field {name!r}: more than {rows} rows were given, the source has {rows}")


def _pieces(
    folder: Path, name: str, chunks: Iterable[Array], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Iterator[Array]:
    for chunk in chunks:
        if not isinstance(chunk, np.ndarray):
            raise wrong("a chunk", chunk, f"a numpy array [n, ...] of the rows of field {name!r}")
        if chunk.shape[1:] != shape or chunk.dtype.newbyteorder("=") != dtype.newbyteorder("="):
            raise StorageError(
                f"{folder}: field {name!r} got {chunk.dtype} {by(chunk.shape[1:])} a row, "
                f"{dtype.name} {by(shape)} was announced"
            )
        if len(chunk):
            yield np.ascontiguousarray(chunk, dtype)


def _checked(root: Path, name: str) -> dict[str, Any]:
    """The contents of a field.json, fully checked. Raises StorageError or NewerSchema."""
    path = root / FIELDS / name / FIELD
    body = read_json(path, root=root)
    check_format(path, body)
    try:
        dtype = _stored(name, body["dtype"])
        shape = [untrusted.integer(f"{path}: shape", size, 0, 2**30) for size in body["shape"][:_MOST_AXES]]
        rows = untrusted.integer(f"{path}: rows", body["rows"], 1)
        per_file = untrusted.integer(f"{path}: rows_per_file", body["rows_per_file"], 1)
        files = untrusted.sequence(f"{path}: files", body["files"], _MOST_FILES)
        fine = body["name"] == name and body["shape"] == shape and len(files) == -(-rows // per_file)
        per_row, start = dtype.itemsize * math.prod(shape), 0
        for part in files:
            untrusted.text(f"{path}: a file", part["file"], r"s\d{5}\.[A-Za-z0-9]+\.npy")
            untrusted.sha256(f"{path}: {part['file']}", part["sha256"])
            held = min(per_file, rows - start)
            fine = fine and (part["rows"], part["bytes"]) == (held, NPY_HEADER + held * per_row)
            start += held
    except (KeyError, TypeError) as error:
        raise StorageError(f"{path}: no description of a field ({error!r}); restore it from a copy") from error
    if not fine:
        raise StorageError(f"{path}: its names and sizes do not fit each other; restore it from a copy")
    return body


def _folder(root: str | Path, name: str) -> Path:
    if not re.fullmatch(_NAME, name):
        raise WrongArgument("name", f"is {name!r}: the name of a field is lower case letters, digits and underscores")
    return as_path(root) / FIELDS / name


def _stored(name: str, dtype: Any) -> np.dtype[Any]:
    return np.dtype(untrusted.one_of(f"field {name!r}: dtype", dtype, _DTYPES)).newbyteorder("<")
