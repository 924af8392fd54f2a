"""Looking after a pair store: what is complete, what is bad, and which files a shard has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from nfm.stages.stage import Finding, StageError
from nfm.storage import atomic, commits, generations
from nfm.storage import verify as storage_verify
from nfm.storage.commits import Commit
from nfm.storage.errors import StorageError
from nfm.storage.schema import read_spec, shard_name


def pinned(store: Path) -> tuple[Path, int]:
    """(folder, generation) of a store given as its folder (the newest generation) or as a manifest."""
    if store.is_file():
        return store.parent, int(atomic.read_json(store)["generation"])
    return store, max(generations.numbers(store), default=1)


def verify(store: Path, level: Literal["quick", "default"]) -> list[Finding]:
    """What is wrong with a store by itself; `store` is its folder or one of its manifests."""
    root, generation = pinned(store)
    found = storage_verify.verify(root, generation, level)
    return [Finding(finding.file, finding.problem, finding.remedy) for finding in found]


def complete_draws(out: Path) -> int:
    """The number of leading draws whose shards are all committed."""
    spec, done = read_spec(out), commits.committed(out, 1000)
    draws = 0
    while all(shard_name(draws, shard) in done for shard in range(spec.shards_per_draw)):
        draws += 1
    if not draws:
        raise StageError(f"{out}: no draw is complete yet; run the pairs stage again")
    return draws


def check_files(out: Path, done: Mapping[str, Commit]) -> None:
    """A commit whose shard went away must stop the run before the store is sealed over the hole."""
    for commit in done.values():
        for name, size in ((commit.payload, commit.payload_bytes), (commit.index, commit.index_bytes)):
            path = out / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                raise StageError(
                    f"{path}: {'missing' if found is None else f'{found} bytes instead of {size}'}, though "
                    f"{commits.commit_path(out, commit.name)} says it was committed. Restore the file, or run "
                    f"`nfm repair {out}` and then this command again to encode the shard anew"
                )


def bad_shards(out: Path) -> list[str]:
    """The shards that a commit or a manifest names and that are not, whole, what was committed and sealed."""
    sealed: dict[str, set[str]] = {}
    for number in generations.numbers(out):
        for entry in generations.load(out, number)["shards"]:
            sealed.setdefault(entry["name"], set()).add(entry["commit_sha256"])
    committed = {path.stem for path in (out / "commits").glob("d*.json")}
    return [name for name in sorted(committed | set(sealed)) if not _whole(out, name, sealed.get(name, set()))]


def _whole(out: Path, name: str, sealed: set[str]) -> bool:
    try:
        commit = commits.read(out, name)
        if commit is None or sealed - {atomic.hash_file(commits.commit_path(out, name))[0]}:
            return False
        files = (
            (commit.payload, commit.payload_sha256, commit.payload_bytes),
            (commit.index, commit.index_sha256, commit.index_bytes),
        )
        return all(atomic.hash_file(out / file) == (sha256, size) for file, sha256, size in files)
    except StorageError:
        return False


def files_of_shards(out: Path, names: list[str]) -> list[Path]:
    """What must go for these shards to be made again, in the order in which it must go.

    First the manifests that list them, so that a repair that is killed leaves no seal over a hole; then their commits;
    then payloads and index parts of any attempt.
    """
    bad = set(names)
    manifests = [
        generations.manifest_path(out, number)
        for number in generations.numbers(out)
        if bad & {entry["name"] for entry in generations.load(out, number)["shards"]}
    ]
    return manifests + [
        path for folder in ("commits", "shards", "index") for name in names for path in _named(out / folder, name)
    ]


def _named(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}.*"))
