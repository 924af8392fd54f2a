"""The interface of a source of images, and array operations that sources share."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import threading
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nfm.stages.base import Reporter, StageError, Stopped, Unfit
from nfm.storage.errors import StorageError, is_utf8, legible
from nfm.storage.files import atomic, remote
from nfm.storage.files.parallel import parallel
from nfm.storage.files.paths import is_remote
from nfm.storage.format import untrusted

HASH_CHUNK = 1 << 20
BOMB_BYTES, BOMB_RATIO = 1 << 30, 500  # only a repeated value can be packed so tightly


Places = Mapping[str, list[Any]]
Stopping = Callable[[], bool]


@dataclass(frozen=True)
class Loaded:
    """Rows of a source in the requested order. A rejected position holds zeros, and its reason is in `rejected`."""

    images: Any  # [n, C, H, W] uint8, or float16 or float32 if the source holds floats; an array, or `Parts`
    rejected: dict[int, str] = field(default_factory=dict)  # position -> reason
    skipped: dict[str, Any] = field(default_factory=dict)  # reason -> paths of the input that are not rows, see `tree`
    notes: dict[str, int] = field(default_factory=dict)  # decision -> number of images that it was made for


class Source(Protocol):
    """Records in the source's own order. `load` reads the pixels of chosen rows.

    A class may have a static `shape_of(config)`: [C, H, W] of its images if [data] alone determines it, else None.
    `reads_urls` is true if `data.path` may be a URL. An object may have `captions`: a text or None for each row.
    """

    name: str
    keys: list[str]
    labels: np.ndarray  # [N] int64, counted from 0
    test: np.ndarray  # [N] bool, true for rows of the source's own test set
    classes: list[str]

    def load(self, rows: np.ndarray, scratch: Path, report: Reporter) -> Loaded:
        """The pixels of `rows`, in that order. `scratch` is an empty folder for arrays too large for memory."""
        ...

    def digest(self, known: Path | None = None) -> dict[str, Any]:
        """The digest of the content that the source reads: {digest, files, bytes}. Paths and times do not matter.

        `known` is a folder that keeps digests of unchanged files, so that they are not read again.
        """
        ...


class Encoded(ABC):
    """A source of encoded images, which are decoded in parts, in any order, by workers that do not list its rows.

    `seeks` says whether rows in any order cost no more than rows in their own order. `skipped` is what is not a row
    (`tree.Skipped`).
    """

    seeks: bool
    skipped: Any

    @abstractmethod
    def look(self, report: Reporter) -> tuple[int, int]:
        """(height, width) of every image before averages are taken. Refuses and reports what is wrong as a whole."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What `decode` needs besides the places: plain values for JSON."""

    @abstractmethod
    def places(self, rows: np.ndarray) -> Places:
        """Where these rows are, as columns of equal length: a list of bytes, integers or texts each."""

    @abstractmethod
    def decode(
        self, places: Places, about: Mapping[str, Any], size: Sequence[int], scratch: Path, stopping: Stopping
    ) -> Loaded:
        """The pixels at these places, in that order. Raises InterruptedError soon after `stopping` became true."""

    def load(self, rows: np.ndarray, scratch: Path, report: Reporter) -> Loaded:
        """All at once, in this process; see `Source.load`."""
        size = self.look(report)
        try:
            loaded = self.decode(self.places(rows), self.about(), size, scratch, lambda: report.stopping)
        except InterruptedError:
            raise Stopped from None
        self.tell_taken(loaded.notes, report)
        return replace(loaded, skipped=self.skipped.reasons)

    def tell_taken(self, notes: Mapping[str, int], report: Reporter) -> None:
        """Reports what is not a row, and what was decided about images."""
        for line in self.skipped.lines():
            report.say(f"not taken: {line}")
        for note, count in sorted(notes.items()):
            report.say(f"images: {count:,} x {note}")


def box_average(images: np.ndarray, factor: int) -> np.ndarray:
    """Means of factor x factor boxes, rounded half up: [n, C, H, W] uint8 -> [n, C, H/factor, W/factor]."""
    if factor == 1:
        return images
    n, c, h, w = images.shape
    if h % factor or w % factor:
        raise Unfit(f"data.average = {factor} does not divide the images' {h}x{w} pixels: choose a divisor")
    boxes = images.reshape(n, c, h // factor, factor, w // factor, factor)
    area = factor * factor
    return ((2 * boxes.sum(axis=(3, 5), dtype=np.uint32) + area) // (2 * area)).astype(np.uint8)


def keys_of(where: str | Path, names: Sequence[str]) -> list[str]:
    r"""Names of files and folders as keys, which are UTF-8: other bytes are written out, as in `caf\xe9.png`."""
    keys = [name if is_utf8(name) else legible(name) for name in names]
    if len(set(keys)) < len(keys):
        twice = next(key for key, count in Counter(keys).items() if count > 1)
        raise StageError(f"{where}: {twice} is the key of two names, one of which is no UTF-8: rename that one")
    return keys


def check_texts(what: str, names: Iterable[str]) -> None:
    """Refuses names that a reader of the data set would refuse. `what` says in messages what they are."""
    try:
        for name in names:
            untrusted.text(what, name)
    except StorageError as error:
        raise StageError(f"{error}: rename it") from error


def check_unpacked(where: str | Path, packed: int, unpacked: int) -> None:
    """Refuses a small file that unpacks to a huge one."""
    if unpacked > BOMB_BYTES and unpacked > BOMB_RATIO * packed:
        raise StageError(
            f"{where}: {packed:,} bytes that unpack to {unpacked:,}, as images never do: damaged, empty, or made to "
            "fill a machine. Fetch the file anew; if it is meant, save it unpacked"
        )


def scratch_array(scratch: Path, shape: tuple[int, ...], dtype: str = "uint8", name: str = "images.raw") -> np.ndarray:
    """A zeroed array in a mapped file of `scratch`. Its disk space is reserved before the first write."""
    path, size = scratch / name, math.prod(shape) * np.dtype(dtype).itemsize
    try:
        with open(path, "w+b") as file:
            # On a full disk, a write to a map would kill the process with SIGBUS instead of raising an error.
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as error:
        raise StageError(
            f"{path}: no room for {size:,} bytes of decoded images ({error.strerror}): free disk space and run again"
        ) from error
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)


Hashed = tuple[str, int, str]  # of a file: its name, its bytes, the SHA-256 of its content


def digest_files(
    files: Iterable[tuple[str, Path]], open_file: Any = open, threads: int = 8, known: Path | None = None
) -> dict[str, Any]:
    """SHA-256 over (name, size, SHA-256 of the content) of files, sorted by name. Several threads read the files.

    With `known`, the result for files with the same names, sizes, inodes and change times is taken from that folder.
    """
    ordered = sorted(files)
    signature = None if known is None else _signature(ordered)
    if known is None or signature is None:
        return together(hash_files(ordered, open_file, threads))
    note = known / f"{signature}.json"
    with contextlib.suppress(StorageError, KeyError, TypeError):  # an unreadable note is written again
        noted: dict[str, Any] = atomic.read_json(note)["identity"]
        if isinstance(noted["digest"], str):
            return noted
    identity = together(hash_files(ordered, open_file, threads))
    with contextlib.suppress(StorageError):  # if the folder is read-only, the next call has to read the files again
        atomic.write_json(note, {"identity": identity})
    return identity


def together(hashed: Iterable[Hashed]) -> dict[str, Any]:
    """The digest of files that were hashed, in order: {digest, files, bytes}."""
    whole, count, total = hashlib.sha256(), 0, 0
    for name, size, content in hashed:
        whole.update(f"{name}\0{size}\0{content}\n".encode())
        count, total = count + 1, total + size
    return {"digest": whole.hexdigest(), "files": count, "bytes": total}


def hash_files(ordered: Sequence[tuple[str, Path]], open_file: Any = open, threads: int = 8) -> list[Hashed]:
    """Reads files on several threads. Raises StageError for one that cannot be read."""
    over = threading.Event()  # stops the threads; one in a large file would otherwise outlive this call

    def hash_one(item: tuple[str, Path]) -> Hashed:
        name, path = item
        whole, size = hashlib.sha256(), 0
        try:
            with open_file(path, "rb") as file:
                while not over.is_set() and (chunk := file.read(HASH_CHUNK)):
                    whole.update(chunk)
                    size += len(chunk)
        except (OSError, EOFError, zlib.error) as error:
            raise StageError(f"{path}: cannot be read ({error}): restore the file and run again") from error
        return name, size, whole.hexdigest()

    with contextlib.closing(parallel(hash_one, ordered, threads, stop=over)) as hashed:
        return list(hashed)


def _signature(files: Sequence[tuple[str, Path]]) -> str | None:
    """A digest that changes whenever a file may have changed: names, places, sizes, inodes and change times.

    None if an object store says nothing by which a change would show.
    """
    whole = hashlib.sha256()
    for name, path in files:
        try:
            facts = _remote_facts(path) if is_remote(path) else _facts(path)
        except OSError as error:
            raise StageError(f"{path}: cannot be read ({error}): restore the file and run again") from error
        if facts is None:
            return None
        whole.update(f"{name}\0{path}\0{facts}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()


def _facts(path: Path) -> str:
    facts = path.stat()
    return f"{facts.st_size}\0{facts.st_ino}\0{facts.st_ctime_ns}"


def _remote_facts(path: Path) -> str | None:
    """What an object store says of an object, if its entity tag or generation is among it."""
    found = remote.attempt(path, "look at", lambda fs, name: fs.info(name))
    tags = {name.lower(): found[name] for name in found if name.lower() in ("etag", "generation", "md5hash")}
    return f"{found.get('size')}\0{sorted(tags.items())}" if tags else None
