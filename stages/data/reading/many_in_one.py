"""The files of many images that data.path names: a folder, a pattern or one file, on this machine or behind a URL.

A file behind a URL is hashed once, then fetched to the cache, where every copy is checked against that hash: so what is
decoded is what the identity of the data set says.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from nfm.stages.base import Reporter, StageError, Unfit
from nfm.stages.data.reading.tree import HIDDEN, SPLITS, Skipped
from nfm.stages.data.source import digest_files, hash_files, keys_of, together
from nfm.storage.errors import CorruptShard, MissingShard
from nfm.storage.files import remote
from nfm.storage.files.durable import StoredFile
from nfm.storage.files.paths import as_path, is_remote, names_in, size_of

MOST_FILES = 100_000
UNUSED = "a validation file beside test files, which are the ones held out"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class ManyInOne:
    """Files that end with `ending`, sorted by name, each of training or held-out images.

    `names` are unique names for keys. Files of a folder with other endings are counted in `skipped`.
    """

    def __init__(self, path: str | None, source: str, ending: str):
        if path is None:
            raise Unfit(
                f'data.source = "{source}" needs data.path: a folder of {ending} files, a pattern such as '
                f'"{{00000..00012}}{ending}", or one file'
            )
        self.path, self.ending, self.skipped = path, ending, Skipped()
        named = self._named(path)
        if len(set(map(str, named))) < len(named):
            raise Unfit(f"data.path = {path!r} names a file twice: name each once")
        ordered = dict(sorted(zip(_short(named), named)))
        roles = self._roles(list(ordered))
        self.paths = [path for path, role in zip(ordered.values(), roles) if role is not None]
        self.names = keys_of(path, [name for name, role in zip(ordered, roles) if role is not None])
        self.heldout = [role == "heldout" for role in roles if role is not None]
        self._stored: list[StoredFile] = []  # of files behind URLs, once they were hashed

    def __len__(self) -> int:
        return len(self.paths)

    def stem(self, number: int) -> str:
        """The name of a file without its ending, for the keys of its images."""
        return self.names[number].removesuffix(self.ending)

    def digest(self, known: Path | None = None) -> dict[str, Any]:
        """The digest of the files' content; see `Source.digest`."""
        if self._stored:
            return together((file.path, file.bytes, file.sha256) for file in self._stored)
        return digest_files(zip(self.names, self.paths), _opened, known=known)

    def about(self) -> dict[str, Any]:
        """What another process needs to read the same files: their names, and the hashes of those behind URLs."""
        if any(map(is_remote, self.paths)):
            self.hash()
        return {"names": self.names, "stored": [[file.path, file.sha256, file.bytes] for file in self._stored]}

    def recall(self, about: Mapping[str, Any]) -> None:
        """Takes over what `about` said elsewhere. Raises StageError if other files are here."""
        if about["names"] != self.names:
            raise StageError(f"{self.path}: other files are here than were listed when the work began: run again")
        self._stored = [StoredFile(name, sha256, size) for name, sha256, size in about["stored"]]

    def hash(self) -> None:
        """Reads files behind URLs once, so that copies of them can be checked; `open` does it if nobody has."""
        if not self._stored:
            hashed = hash_files(list(zip(self.names, self.paths)), _opened)
            self._stored = [StoredFile(name, sha256, size) for name, size, sha256 in hashed]

    def open(self, number: int) -> IO[bytes]:
        """A file of this machine, open for reading; one behind a URL is fetched and checked first."""
        path = self.paths[number]
        if not is_remote(path):
            return path.open("rb")
        from nfm.storage.files.copies.cache import default_cache

        self.hash()
        stored = self._stored[number]
        file = StoredFile(path.name, stored.sha256, stored.bytes)
        try:
            opened: IO[bytes] = default_cache().opened(path.parent, [file], lambda paths: paths[0].open("rb"))
        except (CorruptShard, MissingShard) as error:
            raise StageError(f"{path}: is not what it was when it was hashed ({error}): run again") from error
        return opened

    def tell_splits(self, report: Reporter) -> None:
        """Reports files of one split alone, which are all taken as images to train on."""
        if (role := _role(self.names[0])) is not None and role != "training" and not any(self.heldout):
            report.say(f"{self.path}: only {role} files are there; their images are taken as those to train on")

    def _named(self, path: str) -> list[Path]:
        place = as_path(path)
        if not is_remote(place) and place.is_dir():
            return self._of_folder(place, "*")
        if not is_remote(place) and place.exists():
            return [self._checked(place)]
        found: list[Path] = []
        for text in _expanded(path):
            place = as_path(text)
            if any(sign in str(place.parent) for sign in "*?["):
                raise Unfit(f"data.path = {path!r}: * ? and [ stand in the name of the file alone; name one folder")
            if any(sign in place.name for sign in "*?["):
                found += self._of_folder(place.parent, place.name)
            elif is_remote(place) and not text.endswith(self.ending) and text == path:
                found += self._of_folder(place, "*")
            elif not is_remote(place) and not place.is_file():
                raise Unfit(f"data.path = {path!r}: there is no file {text}; name a folder, a pattern or a file")
            else:
                found.append(self._checked(place))
        return found

    def _of_folder(self, folder: Path, pattern: str) -> list[Path]:
        names = [name for name in names_in(folder) if fnmatch.fnmatchcase(name, pattern)]
        taken = [folder / name for name in names if self._is_taken(folder, name)]
        if not taken:
            others = f"; there are {', '.join(names[:4])}" if names else ""
            what = "" if pattern == "*" else f" of the name {pattern}"
            raise Unfit(f"data.path = {self.path!r}: no {self.ending} file{what} in {folder}{others}: name their place")
        return taken

    def _is_taken(self, folder: Path, name: str) -> bool:
        if re.search(rf"{re.escape(self.ending)}\.\w+$|\.tgz$", name):
            raise StageError(f"{folder / name}: is compressed, and images are compressed already: unpack it")
        if name.startswith("."):
            self.skipped.add(HIDDEN, name)
        elif not name.endswith(self.ending):
            self.skipped.add(f"no {self.ending} file", name)
        else:
            return is_remote(folder) or self._checked(folder / name) is not None
        return False

    def _checked(self, path: Path) -> Path:
        if not path.name.endswith(self.ending):
            raise Unfit(f"data.path = {self.path!r}: {path.name} is no {self.ending} file: rename it, or name another")
        if not is_remote(path) and not path.is_file():
            raise StageError(f"{path}: is no plain file: move it away")
        return path

    def _roles(self, names: Sequence[str]) -> list[str | None]:
        """ "training" or "heldout" for each file; None for one that is not read."""
        roles = [_role(name) for name in names]
        there = set(roles)
        if len(there) == 1:
            return ["training"] * len(names)
        if "training" not in there or None in there:
            first = {role or "no split": name for role, name in zip(roles, names)}
            told = ", ".join(f"{name} ({role})" for role, name in first.items())
            raise Unfit(
                f"data.path = {self.path!r}: cannot tell which files are to train on: {told}; name those by a pattern, "
                f"or rename them to train-..., test-..."
            )
        unused = "validation" if {"test", "validation"} <= there else ""
        for name, role in zip(names, roles):
            if role == unused:
                self.skipped.add(UNUSED, name)
        return [None if role == unused else "training" if role == "training" else "heldout" for role in roles]


def _role(name: str) -> str | None:
    """The split that a word in the name of a file says: `train-00000-of-00002.parquet`, `cifar10_test.tar`."""
    roles = {SPLITS[word] for word in re.findall("[a-z]+", name.casefold()) if word in SPLITS}
    if len(roles) > 1:
        raise StageError(f"{name}: is of {' and '.join(sorted(roles))} by its name: rename it")
    return roles.pop() if roles else None


def _short(paths: Sequence[Path]) -> list[str]:
    """The paths without the folders that all have in common."""
    parts = [str(path).split("/") for path in paths]
    columns = zip(*(folders for *folders, _ in parts))
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    return ["/".join(part[shared:]) for part in parts]


def _expanded(text: str) -> list[str]:
    """A pattern with braces as WebDataset has them, also several: `{00000..00012}`, `{a,b}`."""
    if (match := _BRACES.search(text)) is None:
        return [text]
    rest, choices = _expanded(text[match.end() :]), _choices(match[1])
    if len(rest) * len(choices) > MOST_FILES:
        raise Unfit(f"data.path: {text} names more than {MOST_FILES:,} files; name their folder")
    return [text[: match.start()] + choice + after for choice in choices for after in rest]


def _choices(inside: str) -> list[str]:
    if (numbers := _RANGE.fullmatch(inside)) is None:
        return inside.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if not 0 <= last - first < MOST_FILES:
        raise Unfit(f"data.path: {{{inside}}} names none, or more than {MOST_FILES:,} files; correct the numbers")
    width = len(numbers[1]) if numbers[1].startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(first, last + 1)]


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[Any]:
    """A file to be hashed, read in order."""
    if not is_remote(path):
        with path.open("rb") as file:
            yield file
        return
    if (size := size_of(path)) is None:
        raise FileNotFoundError("there is no such object")
    yield _Pieces(path, size)


class _Pieces:
    """An object of a store as a file that is read once."""

    def __init__(self, path: Path, size: int):
        self._path, self._size, self._arrived = path, size, 0
        self._pieces = remote.read_pieces(path, size)

    def read(self, count: int) -> bytes:
        """The next bytes, as many as arrive at a time. Raises OSError if fewer arrive than the object has."""
        piece = next(self._pieces, b"")
        self._arrived += len(piece)
        if not piece and self._arrived != self._size:
            raise OSError(f"{self._arrived:,} of {self._size:,} bytes arrived")
        return piece
