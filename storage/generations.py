"""Generations: manifests that pin the draws and commits a reader sees; a store grows by new ones only."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nfm.storage import checked, commits, layout
from nfm.storage.atomic import content_digest, create_json, hash_file, read_json
from nfm.storage.commit_record import check_files
from nfm.storage.errors import MissingShard, StorageError
from nfm.storage.moments import check_moments, pool
from nfm.storage.order import order_key
from nfm.storage.paths import as_path, exists, inside, names_in, several
from nfm.storage.schema import FORMAT, StoreSpec, check_format, parse_name, read_spec, shard_name

_LISTED = 8  # pending shards named in a message
_MOST_DRAWS = 1000
_MOST_SHARDS = 2_000_000


def manifest_path(root: str | Path, generation: int) -> Path:
    """Where the manifest of a generation stands."""
    return as_path(root) / f"manifest.g{generation:04d}.json"


def numbers(root: str | Path) -> list[int]:
    """The sealed generations of a store, ascending."""
    found = (re.fullmatch(r"manifest\.g(\d{4,})\.json", name) for name in names_in(as_path(root)))
    return sorted(int(match[1]) for match in found if match)


def next_number(root: str | Path) -> int:
    """The number the next generation gets; the first is 1. One that a repair set aside never returns."""
    quarantine = as_path(root) / "quarantine"
    aside = [number for name in names_in(quarantine) for number in numbers(quarantine / name)]
    return max([*numbers(root), *aside], default=0) + 1


def load(root: str | Path, generation: int) -> dict[str, Any]:
    """The manifest of a generation, with any extra keys. Raises StorageError or NewerSchema."""
    path = manifest_path(root, generation)
    if not exists(path):
        listed = ", ".join(map(str, numbers(root))) or "none"
        raise StorageError(f"{path}: no such generation (sealed: {listed}); choose one of these or seal the store")
    body = read_json(inside(as_path(root), path.name))
    check_format(path, body)
    missing = {"generation", "draws", "order_key", "content_digest", "records", "shards"} - set(body)
    if missing:
        raise StorageError(f"{path}: no manifest of a pair store, it lacks {', '.join(sorted(missing))}")
    if checked.integer(f"{path}: generation", body["generation"], 1) != generation:
        raise StorageError(f"{path}: is the manifest of generation {body['generation']}; restore it from a copy")
    checked.integer(f"{path}: draws", body["draws"], 1, _MOST_DRAWS)
    checked.integer(f"{path}: records", body["records"], 1)
    for key in ("order_key", "content_digest"):
        checked.sha256(f"{path}: {key}", body[key])
    if "moments" in body:
        check_moments(f"{path}: moments", body["moments"])
    for entry in checked.sequence(f"{path}: shards", body["shards"], _MOST_SHARDS):
        _check_entry(path, checked.mapping(f"{path}: a shard", entry))
    return body


def _check_entry(path: Path, entry: Mapping[str, Any]) -> None:
    needed = {"name", "payload", "sha256", "bytes", "index", "index_sha256", "index_bytes", "records", "commit_sha256"}
    if missing := needed - set(entry):
        raise StorageError(f"{path}: a shard lacks {', '.join(sorted(missing))}; restore it from a copy")
    name = checked.text(f"{path}: the name of a shard", entry["name"], most=40)
    parse_name(name)
    check_files(f"{path}: {name}", entry, name, "")
    checked.sha256(f"{path}: {name}: commit_sha256", entry["commit_sha256"])


def newest(root: str | Path) -> tuple[int, dict[str, Any]] | None:
    """(number, manifest) of the newest generation, None when the store has never been sealed."""
    found = numbers(root)
    return (found[-1], load(root, found[-1])) if found else None


def names_of(spec: StoreSpec, draws: int) -> list[str]:
    """The names of all shards of `draws` draws, in their order. Raises StorageError beyond two million."""
    if draws * spec.shards_per_draw > _MOST_SHARDS:
        raise StorageError(f"{draws} draws of {spec.shards_per_draw} shards are too many for one generation")
    return [shard_name(draw, shard) for draw in range(draws) for shard in range(spec.shards_per_draw)]


def build(root: str | Path, spec: StoreSpec, draws: int) -> dict[str, Any]:
    """The manifest of draws 0 to `draws` - 1, to be published; the newest itself if it holds exactly that.

    `content_digest` is over the payload digests alone, in order; `records` counts all draws; `moments` are
    pooled. Files of layout zarr are placed, see `layout.seal`. Raises MissingShard, listing what is pending.
    """
    if draws < 1:
        raise StorageError(f"{root}: draws = {draws}; seal at least one")
    names = names_of(spec, draws)
    found = commits.committed(root, draws)
    pending = [name for name in names if name not in found]
    if pending:
        more = f" and {len(pending) - _LISTED} more" if len(pending) > _LISTED else ""
        raise MissingShard(
            f"{root}: {len(pending)} of {len(names)} shards are not committed: "
            f"{', '.join(pending[:_LISTED])}{more}; run the pairs stage again to encode them"
        )
    held = [found[name] for name in names]
    for commit in held:
        if commit.records != len(spec.slots_of(commit.shard)):
            raise StorageError(f"{root}: {commit.name} has {commit.records} records; set its commit aside")
    body = {
        "format": FORMAT,
        "generation": next_number(root),
        "draws": draws,
        "order_key": order_key(spec.source, spec.rows, draws),
        "content_digest": content_digest(commit.payload_sha256 for commit in held),
        "records": sum(commit.records for commit in held),
        "shards": several(as_path(root), lambda commit: _entry(root, commit), held),
        "moments": pool((c.records * math.prod(spec.field("noise").shape), c.moments) for c in held),
        "clipped": sum(commit.clipped for commit in held),
    }
    layout.seal(root, spec, draws, held)
    last = newest(root)
    if last is not None:
        before = {"clipped": 0} | last[1]  # generations of old do not state it
        if all(before.get(key) == body[key] for key in body if key != "generation"):
            return last[1]
    return body


def _entry(root: str | Path, commit: commits.Commit) -> dict[str, Any]:
    entry = {
        "name": commit.name,
        "payload": commit.payload,
        "sha256": commit.payload_sha256,
        "bytes": commit.payload_bytes,
        "index": commit.index,
        "index_sha256": commit.index_sha256,
        "index_bytes": commit.index_bytes,
        "records": commit.records,
        "commit_sha256": hash_file(commits.commit_path(root, commit.name))[0],
    }
    return entry | ({"parts": [dict(part) for part in commit.parts]} if commit.parts else {})


def seal(root: str | Path, draws: int, **provenance: Any) -> dict[str, Any]:
    """Publishes the generation of `draws` draws, unless the newest holds exactly that; returns its manifest.

    `provenance` adds keys to the manifest. For tests and for stores made without the pipeline.
    """
    body = build(root, read_spec(root), draws)
    number = int(body["generation"])
    path = manifest_path(root, number)
    created = not exists(path) and create_json(path, provenance | body)
    stands = load(root, number)
    if not created and any(stands.get(key) != body[key] for key in body):
        raise StorageError(f"{path}: another process sealed it just now, with other shards; seal again")
    return stands
