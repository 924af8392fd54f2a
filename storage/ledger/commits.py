"""Commits: a shard exists when its commit exists, and the first commit of a name wins.

A worker writes the payload and its index part under names of its own attempt. When both are durable, it publishes the
commit. If it is killed before that, it leaves files that nothing refers to. Two workers on the same shard leave one
commit.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from nfm.storage import layouts
from nfm.storage.errors import MissingShard, StorageError
from nfm.storage.files import folder as listing
from nfm.storage.files import signed_json
from nfm.storage.files.atomic import create_json, digest, hash_file, read_json
from nfm.storage.files.paths import as_path, exists, remove, several, size_of
from nfm.storage.format.commit import Commit, parse
from nfm.storage.format.spec import FORMAT, parse_name

__all__ = ["Commit", "commit_path", "committed", "names", "publish", "read", "read_many"]
_CHUNK = 1024  # commits in memory at a time


def publish(root: str | Path, commit: Commit) -> Commit:
    """Commits a shard if nobody has done so. Returns the valid commit, which may be an earlier one.

    The files of a losing attempt are removed. Raises MissingShard if the files of `commit` do not exist.
    """
    root = as_path(root)
    path = commit_path(root, commit.name)
    staged = [(f"{commit.payload}/{part['field']}", part["bytes"]) for part in commit.parts]
    for file, size in (*(staged or [(commit.payload, commit.payload_bytes)]), (commit.index, commit.index_bytes)):
        if size_of(root / file) != size:
            earlier = read(root, commit.name)
            if earlier is not None:  # our own, sealed since then; or another worker's, who then removed our files
                return earlier
            raise MissingShard(f"{root / file}: not there with {size} bytes; write the shard before its commit")
    body = dataclasses.asdict(commit)
    if body["noise_error"] is None:  # not measured: written as in earlier versions
        del body["noise_error"]
    if create_json(path, {"format": FORMAT, **body}):
        return commit
    winner = read(root, commit.name)
    if winner is None:
        raise StorageError(f"{path}: vanished while it was read; who removes commits?")
    if winner.attempt != commit.attempt:
        layouts.remove(root / commit.payload, commit.parts)
        remove(root / commit.index)
    return winner


def commit_path(root: str | Path, name: str) -> Path:
    """The path of the commit of the shard `name`."""
    return as_path(root) / "commits" / f"{name}.json"


def read(root: str | Path, name: str) -> Commit | None:
    """The commit of the shard `name`, None if there is none. Raises StorageError if it is damaged."""
    path = commit_path(root, name)
    if not exists(path):
        return None
    return parse(path, name, read_json(path, root=as_path(root)))


def names(root: str | Path, draws: int) -> list[str]:
    """The shards of draws 0 to `draws` - 1 that have a commit, in order. It only lists the folder."""
    files = listing.names(as_path(root), "commits")
    found = (file[:-5] for file in files if _IS_COMMIT(file))
    return sorted(name for name in found if parse_name(name)[0] < draws)


_IS_COMMIT = re.compile(r"d\d{3}-s\d{5}\.json", re.ASCII).fullmatch


def committed(root: str | Path, draws: int) -> dict[str, Commit]:
    """The commits of draws 0 to `draws` - 1 by name, in order. All are in memory at once; compare `read_many`."""
    return {commit.name: commit for commit, _ in read_many(root, names(root, draws))}


def read_many(root: str | Path, names: Sequence[str]) -> Iterator[tuple[Commit, str]]:
    """The commits of these shards, each with the SHA-256 of its file; only some are in memory at a time.

    A missing one is left out. Raises StorageError if one is damaged.
    """
    where = as_path(root)
    with listing.Folder(where, "commits") as folder:

        def one(name: str) -> tuple[Commit, str] | None:
            path, data = commit_path(where, name), folder.read(f"{name}.json")
            if data is not None:
                try:
                    return parse(path, name, signed_json.checked(path, data, signed=True)), digest(data)
                except StorageError:
                    pass  # damaged on the way from an object store; otherwise the next read fails too
            commit = read(where, name)
            return None if commit is None else (commit, hash_file(path)[0])

        for start in range(0, len(names), _CHUNK):
            yield from filter(None, several(where, one, names[start : start + _CHUNK]))
