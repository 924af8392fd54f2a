"""Which files a store may hold, and whether those it names are there and whole."""

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
# What others keep beside a store's own files, see DESIGN.md: the pipeline's records and what a repair set aside.
_BESIDE = ("events", "audits", "failed", "quarantine")
_LOCKS = r"lock\.json|lock\.[0-9a-f]+\.taken"
_ATTEMPT = r"(d\d{3}-s(\d{5}))\.[A-Za-z0-9_-]+"


@dataclass(frozen=True)
class Finding:
    """One thing wrong: the level of the check that saw it, the file, the problem and the remedy."""

    level: Level
    file: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}; {self.remedy}"


def finding_of(level: Level, path: Path, error: StorageError, remedy: str) -> Finding:
    """What a reader said of a file, as a finding about it."""
    cause = str(error).split("; ")[0].removeprefix(f"{path}: ")
    return Finding(level, str(path), cause, remedy)


def check_file(root: Path, file: StoredFile, level: Level, remedy: str) -> Finding | None:
    """Whether a file has its size, above `quick` also whether its bytes are what was committed."""
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
    """The files of a shard on this machine: themselves, or copies of what an object store holds now.

    No cache is asked, which might have kept whole what is damaged there. Raises StorageError for other bytes than
    were committed.
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
    """Whether links take a file of the store out of its folder. Object stores have none."""
    return not is_remote(path) and not path.resolve().is_relative_to(root.resolve())


def surplus(root: Path, spec: StoreSpec, named: Iterable[str]) -> tuple[list[Finding], list[str]]:
    """(findings, orphans): files that no rule of the format explains, and those that unfinished attempts left.

    `named` are the files that a manifest, a commit or a field names, relative to the store. A worker that is killed
    leaves temporary files and whole files of its attempt; they are of no harm and no finding.
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
    """Every file below a store's root but those kept beside it, relative, sorted by folder; links are not followed."""
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
    """The files at the root, and commits of shards that the spec has; what they hold is another check's."""
    if match := re.fullmatch(r"manifest\.g(\d{4,9})\.json", file):
        return file == seal.manifest_path(root, int(match[1])).name
    if match := re.fullmatch(r"commits/d\d{3}-s(\d{5})\.json", file):
        return int(match[1]) < spec.shards_per_draw
    return file == SPEC or re.fullmatch(_LOCKS, file) is not None


def _is_orphan(spec: StoreSpec, file: str, known: set[str]) -> bool:
    if is_temporary(file) or is_list_name(file):  # a list is written before the manifest that names it
        return True
    match = re.fullmatch(rf"index/{_ATTEMPT}\.parquet", file) or re.fullmatch(rf"shards/{_ATTEMPT}(\.tar|/\w+)", file)
    if match is not None:
        staged = file.endswith(".tar") != layouts.of(spec).by_field or file.startswith("index/")
        return staged and int(match[2]) < spec.shards_per_draw
    # A field's files come before its field.json, by which it exists; another attempt's may stay beside.
    return re.fullmatch(r"fields/[a-z][a-z0-9_]*/s\d{5}\.[A-Za-z0-9]+\.npy", file) is not None
