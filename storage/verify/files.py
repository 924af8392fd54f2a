"""Which files a store may hold, and whether the files that it names exist and are intact."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

from nfm.storage import layouts
from nfm.storage.errors import StorageError
from nfm.storage.files import remote
from nfm.storage.files.atomic import hash_file, is_temporary
from nfm.storage.files.durable import StoredFile
from nfm.storage.files.paths import is_remote, size_of
from nfm.storage.format.spec import SPEC, StoreSpec
from nfm.storage.ledger import seal
from nfm.storage.ledger.shard_list import is_list_name

Level = Literal["quick", "default", "deep"]
LEVELS: tuple[Level, ...] = ("quick", "default", "deep")
# Folders beside a store's own files: the pipeline's records, what a repair set aside, what a hub's client adds.
_BESIDE = ("events", "audits", "failed", "quarantine", ".git", ".cache")
_BESIDE_FILES = ("README.md", ".gitattributes")  # a card, and what hubs add to it
_LOCKS = r"lock\.json|lock\.[0-9a-f]+\.taken"
_ATTEMPT = r"(d\d{3}-s(\d{5}))\.[A-Za-z0-9_-]+"


@dataclass(frozen=True)
class Finding:
    """One fault: the level of the check that found it, the file, the problem and the remedy."""

    level: Level
    file: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}; {self.remedy}"


def finding_of(level: Level, path: Path, error: StorageError, remedy: str) -> Finding:
    """An error of a reader about a file, as a finding."""
    cause = str(error).split("; ")[0].removeprefix(f"{path}: ")
    return Finding(level, str(path), cause, remedy)


def check_file(root: Path, file: StoredFile, level: Level, remedy: str) -> Finding | None:
    """Checks the size of a file, and above `quick` also its hash."""
    path = root / file.path
    found = size_of(path)
    if found is None:
        return Finding("quick", str(path), "the file is missing", remedy)
    if found != file.bytes:
        return Finding("quick", str(path), f"{found} bytes, {file.bytes} were committed: truncated or altered", remedy)
    if leads_outside(root, path):
        return Finding("quick", str(path), "is a link that leads outside the store", remedy)
    if level != "quick":
        try:
            actual = hash_file(path)[0]
        except StorageError as error:
            return finding_of("default", path, error, remedy)
        if actual != file.sha256:
            return Finding("default", str(path), f"SHA-256 {actual[:12]}, {file.sha256[:12]} was committed", remedy)
    return None


@contextmanager
def local_copies(root: Path, files: Sequence[StoredFile]) -> Iterator[list[Path]]:
    """The files of a shard on this machine: the files themselves, or new copies from an object store.

    No cache is used, as it may hold an intact copy of a damaged file. Raises StorageError if the bytes are not the
    committed ones.
    """
    if not is_remote(root):
        yield [root / file.path for file in files]
        return
    with TemporaryDirectory(prefix="nfm-verify-") as folder:
        copies = []
        for number, file in enumerate(files):
            copy, sha = Path(folder) / f"{number}-{Path(file.path).name}", hashlib.sha256()
            with open(copy, "wb") as out:
                for piece in remote.read_pieces(root / file.path, file.bytes):
                    sha.update(piece)
                    out.write(piece)
            if sha.hexdigest() != file.sha256:
                raise StorageError(f"{root / file.path}: arrived with another SHA-256 than was committed")
            copies.append(copy)
        yield copies


def leads_outside(root: Path, path: Path) -> bool:
    """Whether links lead from a file of the store out of its folder. Object stores have no links."""
    return not is_remote(path) and not path.resolve().is_relative_to(root.resolve())


def surplus(root: Path, spec: StoreSpec, named: Iterable[str]) -> tuple[list[Finding], list[str]]:
    """(findings, orphans): files that the format does not explain, and files that unfinished attempts left.

    `named` are the files that a manifest, a commit or a field names, relative to the store. A killed worker leaves
    temporary files and complete files of its attempt. They are harmless and not findings.
    """
    known, findings, orphans = set(named), [], []
    for file in listing(root):
        if file in known or _explained(root, spec, file):
            continue
        if _is_orphan(spec, file, known):
            orphans.append(file)
        else:
            remedy = "no part of this store: move it away, or find out who put it there"
            findings.append(Finding("quick", str(root / file), "no file of this store", remedy))
    return findings, orphans


def listing(root: Path) -> Iterator[str]:
    """Every file below the root of a store, relative and sorted by folder. Folders beside the store's files are left
    out, and links are not followed.
    """
    if is_remote(root):
        remote = cast(Any, root)
        below = str(remote.path).rstrip("/") + "/"
        found = (str(path).removeprefix("/") for path in remote.fs.find(remote.path))
        names = (path[len(below.removeprefix("/")) :] for path in found)
        yield from sorted(name for name in names if name.split("/")[0] not in _BESIDE)
        return
    for folder, folders, files in os.walk(root):
        inside = os.path.relpath(folder, root)
        prefix = "" if inside == "." else f"{inside}/"
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        folders[:] = sorted(name for name in folders if name not in links and (prefix or name not in _BESIDE))
        yield from (f"{prefix}{name}" for name in sorted([*files, *links]))


def _explained(root: Path, spec: StoreSpec, file: str) -> bool:
    """Whether a file is one of those at the root, or a commit of a shard of the spec.

    Other checks read the contents.
    """
    if match := re.fullmatch(r"manifest\.g(\d{4,9})\.json", file):
        return file == seal.manifest_path(root, int(match[1])).name
    if match := re.fullmatch(r"commits/d\d{3}-s(\d{5})\.json", file):
        return int(match[1]) < spec.shards_per_draw
    return file == SPEC or file in _BESIDE_FILES or re.fullmatch(_LOCKS, file) is not None


def _is_orphan(spec: StoreSpec, file: str, known: set[str]) -> bool:
    if is_temporary(file) or is_list_name(file):  # a list is written before the manifest that names it
        return True
    match = re.fullmatch(rf"index/{_ATTEMPT}\.parquet", file) or re.fullmatch(rf"shards/{_ATTEMPT}(\.tar|/\w+)", file)
    if match is not None:
        staged = file.endswith(".tar") != layouts.of(spec).by_field or file.startswith("index/")
        return staged and int(match[2]) < spec.shards_per_draw
    # The files of a field are written before field.json makes it exist. Those of another attempt may also be there.
    return re.fullmatch(r"fields/[a-z][a-z0-9_]*/s\d{5}\.[A-Za-z0-9]+\.npy", file) is not None
