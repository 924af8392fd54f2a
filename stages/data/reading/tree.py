"""The image files below a folder. Hidden names are left out, links are followed, and skipped paths are counted."""

from __future__ import annotations

import errno
import functools
import mimetypes
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nfm.stages.base import StageError
from nfm.storage.errors import legible

SHOWN = 3

# What a folder of class folders, or a file of many images, holds by its name, in upper or lower case.
SPLITS = {
    **dict.fromkeys(("train", "training"), "training"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
}

HIDDEN = "hidden: the name begins with a dot"
DANGLING = "a link to nothing"
SPECIAL = "no file and no folder (a socket, a pipe, a device)"
TWICE = "a folder that is read at another path of the same class"
LOOSE = "a file outside the class folders"
EMPTY = "a folder without an image"


@dataclass
class Skipped:
    """Skipped paths: their number for each reason, and the first few. A skipped folder counts as one path."""

    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, reason: str, path: str) -> None:
        entry = self.reasons.setdefault(reason, {"paths": 0, "first": []})
        entry["paths"] += 1
        if len(entry["first"]) < SHOWN:
            entry["first"].append(legible(path))

    def lines(self, most: int | None = None) -> list[str]:
        """Lines for the user, one for each reason.

        If there are more than `most`, the most frequent ones and a summary of several others.
        """
        entries = sorted(self.reasons.items())
        if most is not None and len(entries) > most:
            entries = sorted(entries, key=lambda item: -item[1]["paths"])
            most += len(entries) == most + 1  # the line would be of one reason alone
        lines = [
            f"{entry['paths']:,} x {reason} ({', '.join(entry['first'])}{', ...' if entry['paths'] > SHOWN else ''})"
            for reason, entry in entries[:most]
        ]
        if rest := entries[len(lines) :]:
            lines.append(f"{sum(entry['paths'] for _, entry in rest):,} x {len(rest):,} other reasons")
        return lines


@dataclass(frozen=True)
class _Place:
    """A folder: its path below the root, and the real paths of all folders on the way to it, itself last."""

    path: str
    way: tuple[str, ...]


class Tree:
    """Reads folders below `root`, by relative paths. `skipped` collects what is left out.

    A link to a file counts as that file. Links to folders are followed after all real folders, so a folder belongs to
    the class in which it really lies. A folder is read once. If it is reached again from its own class, it is counted.
    If it is reached from another class or split, it is refused; so is a link to a folder that contains the link.
    """

    def __init__(self, root: Path):
        self.root, self.skipped = root, Skipped()
        self.inner: dict[str, list[str]] = {}  # class folder -> names of the folders directly in it
        self._top = _Place("", (os.path.realpath(root),))
        self._owners: dict[str, str] = {}  # real path of a folder that was read -> the class folder it was read for

    def folders(self, part: str = "") -> list[str]:
        """The folders directly in `part`, sorted. Files beside them are counted as skipped."""
        at, found = self._enter(part, self._top) if part else self._top, []
        for path, kind in self._entries(at):
            if kind == "file":
                self.skipped.add(LOOSE, path)
            else:
                found.append(path)
        return found

    def images(self, folders: Sequence[str]) -> dict[str, list[str]]:
        """The image files below each of these class folders (from `folders`), ordered by path."""
        found: dict[str, list[str]] = {folder: [] for folder in folders}
        self.inner |= {folder: [] for folder in folders}
        true: deque[tuple[str, str, _Place]] = deque()  # class folder, path, and the parent folder
        links: deque[tuple[str, str, _Place]] = deque()
        for folder in folders:
            part = os.path.dirname(folder)
            parent = self._enter(part, self._top) if part else self._top
            (links if os.path.islink(self.root / folder) else true).append((folder, folder, parent))
        while true or links:
            owner, path, parent = (true or links).popleft()
            at = self._enter(path, parent)
            if at.way[-1] in self._owners:
                self._refuse_another_owner(path, at, owner)
                self.skipped.add(TWICE, f"{path}/")
                continue
            self._owners[at.way[-1]] = owner
            for inside, kind in self._entries(at):
                if kind != "file":
                    (links if kind == "link" else true).append((owner, inside, at))
                    if path == owner:
                        self.inner[owner].append(os.path.basename(inside))
                elif _ending(inside) in _image_endings() or opens(self.root / inside):
                    found[owner].append(inside)
                else:
                    self.skipped.add(f"no image that Pillow reads: {legible(_ending(inside)) or 'no ending'}", inside)
        for folder, files in found.items():
            files.sort(key=lambda path: path.split("/"))
            if not files:
                self.skipped.add(EMPTY, f"{folder}/")
        return found

    def _refuse_another_owner(self, path: str, at: _Place, owner: str) -> None:
        if (before := self._owners[at.way[-1]]) != owner:
            raise StageError(
                f"{self.root / path}: is the folder {at.way[-1]}, whose images are those of "
                f"{before}/ already; an image has one class, in one split: remove one of the two"
            )

    def _enter(self, path: str, parent: _Place) -> _Place:
        """A folder in `parent`. Raises StageError if it is a link that leads back."""
        if not os.path.islink(self.root / path):
            return _Place(path, (*parent.way, os.path.join(parent.way[-1], os.path.basename(path))))
        true = os.path.realpath(self.root / path)
        if any(on_the_way == true or on_the_way.startswith(true.rstrip("/") + "/") for on_the_way in parent.way):
            raise StageError(f"{self.root / path}: the link leads back to {true}, which holds it: remove the link")
        return _Place(path, (*parent.way, true))

    def _entries(self, at: _Place) -> Iterator[tuple[str, str]]:
        """(path, "file", "folder" or "link" to a folder), sorted. Anything else is counted as skipped."""
        try:
            with os.scandir(self.root / at.path) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
            for entry in inside:
                path = f"{at.path}/{entry.name}" if at.path else entry.name
                kind = HIDDEN if entry.name.startswith(".") else _kind(entry)
                if kind in ("file", "folder", "link"):
                    yield path, kind
                else:
                    self.skipped.add(kind, path)
        except OSError as error:
            raise StageError(
                f"{error.filename or self.root / at.path}: cannot be read ({error.strerror}): mend its "
                "permissions, or remove it"
            ) from error


def _kind(entry: os.DirEntry[str]) -> str:
    """The kind: "file", "folder", "link" (to a folder), or the reason why it is none of them."""
    if not entry.is_symlink():
        return "folder" if entry.is_dir() else "file" if entry.is_file() else SPECIAL
    try:
        mode = os.stat(entry.path).st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return DANGLING
        raise
    return "link" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else SPECIAL


def opens(path: Path) -> bool:
    """Whether Pillow can open a file whose name does not end like an image's."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path):
            return True
    except UnidentifiedImageError:
        return False
    except Exception:  # a broken image may raise anything; decoding will give the reason
        return True


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


@functools.cache
def _image_endings() -> frozenset[str]:
    """File endings of the formats that Pillow opens, and of other images (HEIC, SVG), which are reported as
    unreadable.
    """
    from PIL import Image

    opened = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
    types = mimetypes.MimeTypes().types_map  # Python's own table, the same on every machine
    return frozenset(
        opened | {ending for table in types for ending, kind in table.items() if kind.startswith("image/")}
    )
