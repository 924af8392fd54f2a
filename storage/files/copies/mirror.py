"""The local folders in which stages compute whose artifacts are in a bucket.

An artifact at s3://bucket/run/STAGE/FINGERPRINT has one folder on each machine that works with it, in
`scratch_root()`. What was made there is pushed to the bucket, its manifest last. What a manifest in the bucket lists is
pulled once, and checked by its digests. The bucket is the truth: nothing here is ever read in its place.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nfm.storage.errors import CorruptShard, MissingShard, StorageError
from nfm.storage.files import atomic, clouds, remote
from nfm.storage.files.copies.large import put_new, put_over
from nfm.storage.files.digested_json import RESTORE
from nfm.storage.files.durable import HashingFile
from nfm.storage.files.parallel import parallel
from nfm.storage.files.paths import as_path, inside, is_remote, is_url, scratch_root, size_of

ORIGIN = "origin.json"  # in every folder here: of which artifact it is, and which manifest was pulled
_FILES = 4  # files at a time, each in several requests
_TRIES = 3


def local_folder(artifact: Path) -> Path:
    """The folder on this machine for an artifact; the artifact itself if it is local."""
    if not is_remote(artifact):
        return artifact
    return local_root(artifact.parent.parent) / artifact.parent.name / artifact.name


def local_root(root: Path) -> Path:
    """The folder on this machine for all artifacts of a root in a bucket."""
    return scratch_root() / atomic.digest(str(root).rstrip("/").encode())[:12]


def prepare(artifact: Path) -> Path:
    """The folder on this machine for an artifact that is about to be made, with its spec.json."""
    folder = local_folder(artifact)
    if is_remote(artifact):
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_json(folder / ORIGIN, {"artifact": str(artifact), "manifest": ""})
        atomic.write_json(folder / "spec.json", atomic.read_json(artifact / "spec.json"))
    return folder


def origin(folder: Path) -> str:
    """The artifact of a folder as a text that other machines can read: a URL, or the absolute path of a local one."""
    if not is_remote(folder) and (folder / ORIGIN).exists():
        return str(atomic.read_json(folder / ORIGIN)["artifact"])
    return str(folder if is_remote(folder) else folder.resolve())


def here(place: str) -> str:
    """The text of `origin` as a folder of this machine: the files of an artifact in a bucket are brought here."""
    return str(pull(as_path(place))) if is_url(place) else place


@contextlib.contextmanager
def beside(place: str) -> Iterator[Path]:
    """The text of `origin` as a folder where a process works that shares the making of an artifact with others.

    Of an artifact in a bucket it is a folder of this process alone, which is removed in the end.
    """
    if not is_url(place):
        yield Path(place)
        return
    scratch_root().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="part-", dir=scratch_root()) as folder:
        atomic.write_json(Path(folder) / ORIGIN, {"artifact": place, "manifest": ""})
        yield Path(folder)


def pull(artifact: Path, left_out: str = "checkpoints/") -> Path:
    """The folder on this machine with the files of a finished artifact, brought here if they are not there yet.

    Files below `left_out` stay where they are. Raises StorageError if the artifact is not finished, MissingShard and
    CorruptShard for files that are not what the manifest says.
    """
    if not is_remote(artifact):
        return artifact
    folder, body = local_folder(artifact), atomic.read_json(artifact / "manifest.json")
    files = [file for file in body["files"] if not file["path"].startswith(left_out)]
    if _pulled(folder) == body["digest"] and all(size_of(folder / file["path"]) == file["bytes"] for file in files):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        list(parallel(lambda file: fetch(artifact, folder, file), files, _FILES))
    atomic.write_json(folder / "spec.json", atomic.read_json(artifact / "spec.json"))
    committed(artifact, folder, body)
    return folder


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process of this machine bring files to a folder; others wait, and find them there."""
    handle = os.open(folder / ".pull", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with contextlib.suppress(OSError):  # no locks on this file system: each brings its own, with the same result
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _pulled(folder: Path) -> str:
    with contextlib.suppress(StorageError, KeyError):
        return str(atomic.read_json(folder / ORIGIN)["manifest"])
    return ""


def fetch(artifact: Path, folder: Path, file: dict[str, Any]) -> None:
    """Brings a file of a manifest (path, sha256, bytes), unless the one that is here is the same.

    Raises MissingShard and CorruptShard.
    """
    source, target = artifact / file["path"], inside(folder, file["path"])
    expected = (file["sha256"], file["bytes"])
    if size_of(target) == file["bytes"] and atomic.hash_file(target) == expected:
        return
    for left in reversed(range(_TRIES)):
        try:
            with HashingFile(target) as copy:
                for piece in remote.read_pieces(source, file["bytes"]):
                    copy.write(piece)
                if (copy.sha256, copy.bytes) != expected:
                    told = f"{source}: SHA-256 {copy.sha256[:12]}, its manifest says {file['sha256'][:12]}"
                    raise CorruptShard(f"{told}; {RESTORE}")  # and what arrived is thrown away
            return
        except FileNotFoundError as error:
            raise MissingShard(f"{source}: its manifest lists it, and it is missing; {RESTORE}") from error
        except CorruptShard:
            if not left:
                raise
            time.sleep(0.1)


def committed(artifact: Path, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Notes that `folder` holds what this manifest lists, so that it is not brought here again."""
    if is_remote(artifact):
        atomic.write_json(folder / "manifest.json", manifest)
        body = atomic.read_json(folder / "manifest.json")
        atomic.write_json(folder / ORIGIN, {"artifact": str(artifact), "manifest": body["digest"]})


def push(artifact: Path, folder: Path, digests: Mapping[str, tuple[str, int]], check: Callable[[], None]) -> None:
    """Brings files of `folder` to the bucket, by path with their SHA-256 and size.

    An object that is there already is left alone if it is the same. Another one is of an attempt that was never
    finished, and is replaced after `check`, which raises if this process does not hold the lock any more. If another
    process replaces it in between, its object stays.
    """
    list(parallel(lambda item: _send(artifact, folder, *item, check), digests.items(), _FILES))


def _send(artifact: Path, folder: Path, name: str, digest: tuple[str, int], check: Callable[[], None]) -> None:
    source, target = str(folder / name), artifact / name

    def send() -> bool:
        return remote.create(
            target,
            lambda fs, there: put_new(fs, there, source),
            lambda: atomic.hash_file(target) == digest,
        )

    if send():
        return
    cloud = clouds.of(target)
    tag = cloud.facts(remote.attempt(target, "look at", lambda fs, there: fs.info(there)))[1] if cloud else ""
    if cloud is not None and atomic.hash_file(target) != digest:
        check()
        remote.attempt(target, "write", lambda fs, there: put_over(cloud, fs, there, source, tag))
    if not send():
        raise StorageError(f"{target}: another process writes it; see who works on that artifact, then run this again")
