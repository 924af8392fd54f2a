"""Generations: manifests that fix the draws and commits a reader sees. A store grows only by new generations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nfm.storage import layouts
from nfm.storage.errors import MissingShard, StorageError
from nfm.storage.files import folder
from nfm.storage.files.atomic import create_json
from nfm.storage.files.paths import as_path, exists, is_remote, names_in, remove, size_of
from nfm.storage.format.order import order_key
from nfm.storage.format.spec import FORMAT, StoreSpec, parse_name, read_spec
from nfm.storage.ledger import commits
from nfm.storage.ledger.commits import Commit
from nfm.storage.ledger.generation import PART_OF, Generation, Hole, names_of, slots_of
from nfm.storage.ledger.manifests import (
    files_of,
    load,
    manifest_path,
    newest,
    newest_number,
    next_number,
    numbers,
    pinned,
)
from nfm.storage.ledger.shard_list import Entry
from nfm.storage.ledger.standing import again
from nfm.storage.ledger.sums import Totals

__all__ = [
    "PART_OF", "build", "files_of", "load", "manifest_path", "names_of", "newest", "newest_number", "next_number",
    "numbers", "pending", "pinned", "remove_lost_attempts", "seal",
]  # fmt: skip
_LISTED = 8  # pending shards named in a message
_MOST_REASON = 1000  # characters


def pending(root: str | Path, spec: StoreSpec, draws: int) -> list[str]:
    """The shards of draws 0 to `draws` - 1 without a commit, in order. It uses only the names of the commits."""
    done = set(commits.names(root, draws))
    return [name for name in names_of(spec, draws) if name not in done]


def build(root: str | Path, spec: StoreSpec, draws: int, excluded: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The manifest of draws 0 to `draws` - 1, to be published; a sealed one itself if it holds exactly that.

    If the newest generation has more draws, it stays the newest one, and this manifest says of which one it is a part.

    Shards in `excluded` (name: reason) that are not committed are left out, and the manifest lists them.
    `content_digest` is over the payload digests alone, in order; `records` counts all draws; `moments` are pooled. A
    long list of shards is written to a file beside the manifest. Some layouts also move files, see `layouts.seal`.

    Raises MissingShard, which lists pending shards or names a committed file that is missing. Raises StorageError if a
    draw would be empty, and for a missing shard in layout zarr.
    """
    if draws < 1:
        raise StorageError(f"{root}: draws = {draws}; seal at least one")
    where = as_path(root)
    number = next_number(root)  # before reading the newest: if two processes seal at once, one then finds the other's
    names, holes = _present(where, spec, draws, excluded or {})
    held, last = list[Commit](), newest(where, spec)
    there = folder.shard_files(where)
    with Totals(where, spec, len(names), _like(where, spec, last, draws, holes)) as totals:
        for commit, sha256 in commits.read_many(where, names):
            _check_commit(where, spec, commit, there)
            totals.add(commit, sha256)
            if layouts.of(spec).by_field:
                held.append(commit)
        if totals.sums.shards != len(names):
            raise MissingShard(f"{root}: a commit went away while they were read; who removes commits?")
        layouts.seal(root, spec, draws, held)
        body = {
            "format": FORMAT,
            "generation": number,
            "draws": draws,
            "order_key": order_key(spec.source, spec.rows, draws, slots_of(holes)),
            **totals.body(),
        } | ({"excluded": [hole.to_json() for hole in holes]} if holes else {})
        if (same := totals.same) is not None and _agrees(same.body, body):
            return {**body, **same.body}
        if last is not None and last.draws > draws:
            body[PART_OF] = last.number
        return body | {"shards": totals.listed(body["generation"])}


def seal(root: str | Path, draws: int, excluded: Mapping[str, str] | None = None, **provenance: Any) -> Generation:
    """Publishes the generation of `draws` draws, unless the newest one holds exactly that. Returns it.

    `provenance` adds keys to the manifest. For tests and for stores made without the pipeline.
    """
    spec = read_spec(root)
    body = build(root, spec, draws, excluded)
    number = int(body["generation"])
    path = manifest_path(root, number)
    created = not exists(path) and create_json(path, provenance | body)
    stands = load(root, number, spec)
    if not created and any(key in stands.body and stands.body[key] != body[key] for key in body):
        raise StorageError(f"{path}: another process sealed it just now, with other shards; seal again")
    return stands


def remove_lost_attempts(root: str | Path, entries: Sequence[Entry]) -> None:
    """Removes files of killed attempts for these shards, which are all sealed now."""
    where = as_path(root)
    kept = {file.path for entry in entries for file in (entry.payload, entry.index)}
    names = {entry.name for entry in entries}
    for kind in ("shards", "index"):
        for file in names_in(where / kind):
            if file.partition(".")[0] in names and f"{kind}/{file}" not in kept:
                _remove(where / kind / file)


def _remove(path: Path) -> None:
    if size_of(path) is not None:
        remove(path)
        return
    for part in names_in(path):
        remove(path / part)
    if not is_remote(path):  # object stores have no folders
        path.rmdir()


def _present(root: Path, spec: StoreSpec, draws: int, excluded: Mapping[str, str]) -> tuple[list[str], list[Hole]]:
    """(the shards that a generation holds, the manifest's list of those that it lacks)."""
    names, lacking = names_of(spec, draws), pending(root, spec, draws)
    if missing := [name for name in lacking if name not in excluded]:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise MissingShard(
            f"{root}: {len(missing)} of {len(names)} shards are not committed: "
            f"{', '.join(missing[:_LISTED])}{more}; {again(root)}"
        )
    if not lacking:
        return names, []
    if not layouts.of(spec).holes:
        raise StorageError(
            f"{root}: {len(lacking)} shards are missing ({lacking[0]}, ...), and the arrays of layout {spec.layout} "
            f"can have no holes; {again(root)}, or make the store in layout blocks"
        )
    absent = set(lacking)
    held = [name for name in names if name not in absent]
    if empty := sorted(set(range(draws)) - {parse_name(name)[0] for name in held}):
        raise StorageError(f"{root}: draw {empty[0]} would hold no shard at all; {again(root)}")
    return held, [_hole(spec, name, excluded[name]) for name in lacking]


def _hole(spec: StoreSpec, name: str, reason: str) -> Hole:
    return Hole(name, spec.slots_of(parse_name(name)[1]), " ".join(reason.split())[:_MOST_REASON])


def _check_commit(root: Path, spec: StoreSpec, commit: Commit, there: Mapping[str, int]) -> None:
    """Raises if files of a commit are missing: a store must not be sealed without them."""
    if commit.records != len(spec.slots_of(commit.shard)):
        raise StorageError(f"{root}: {commit.name} has {commit.records} records; set its commit aside")
    if all(there.get(file.path) == file.bytes for file in (commit.payload, commit.index)):
        layouts.files(spec, commit)
        return
    wrong, index = layouts.missing(root, spec, commit), size_of(root / commit.index.path)
    if index != commit.index.bytes:
        wrong.append((root / commit.index.path, commit.index.bytes, index))
    for path, size, found in wrong:
        raise MissingShard(
            f"{path}: {'missing' if found is None else f'{found} bytes instead of {size}'}, though "
            f"{commits.commit_path(root, commit.name)} says it was committed. Restore the file, or run "
            f"`nfm repair {root}`, which sets the shard aside, and then {again(root)}"
        )


def _like(root: Path, spec: StoreSpec, last: Generation | None, draws: int, holes: list[Hole]) -> Generation | None:
    """The sealed generation that could be the one that is being built: the newest, `last`, or one with fewer draws."""
    if last is not None and last.draws > draws:
        fewer = (load(root, number, spec) for number in reversed(numbers(root)))
        last = next((sealed for sealed in fewer if sealed.draws == draws), None)
    if last is None or last.draws != draws:
        return None
    return last if [hole.name for hole in last.excluded] == [hole.name for hole in holes] else None


def _agrees(last: Mapping[str, Any], body: Mapping[str, Any]) -> bool:
    """Whether a manifest with the same shards also agrees in its other keys. Older ones lack some keys."""
    apart = ("generation", "shards", "excluded")
    return all(last.get(key, body[key]) == body[key] for key in body if key not in apart)
