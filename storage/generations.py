"""Generations: manifests that pin the draws and commits a reader sees; a store grows by new ones only."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from nfm.storage import commits
from nfm.storage.atomic import content_digest, create_json, hash_file, read_json
from nfm.storage.errors import MissingShard, NewerSchema, StorageError
from nfm.storage.moments import pool
from nfm.storage.order import order_key
from nfm.storage.schema import FORMAT, StoreSpec, read_spec, shard_name

_LISTED = 8  # pending shards named in a message


def manifest_path(root: str | Path, generation: int) -> Path:
    """Where the manifest of a generation stands."""
    return Path(root) / f"manifest.g{generation:04d}.json"


def numbers(root: str | Path) -> list[int]:
    """The sealed generations of a store, ascending."""
    found = (re.fullmatch(r"manifest\.g(\d{4,})\.json", path.name) for path in Path(root).glob("manifest.g*.json"))
    return sorted(int(match[1]) for match in found if match)


def next_number(root: str | Path) -> int:
    """The number the next generation gets; the first is 1. One that a repair set aside never returns."""
    aside = [number for folder in Path(root).glob("quarantine/*") for number in numbers(folder)]
    return max([*numbers(root), *aside], default=0) + 1


def load(root: str | Path, generation: int) -> dict[str, Any]:
    """The manifest of a generation, with any extra keys. Raises StorageError or NewerSchema."""
    path = manifest_path(root, generation)
    if not path.exists():
        listed = ", ".join(map(str, numbers(root))) or "none"
        raise StorageError(f"{path}: no such generation (sealed: {listed}); choose one of these or seal the store")
    body = read_json(path)
    if int(body.get("format", FORMAT)) > FORMAT:
        raise NewerSchema(f"{path}: format {body['format']}, this nfm-pairs reads up to {FORMAT}; install a newer one")
    missing = {"generation", "draws", "order_key", "content_digest", "records", "shards"} - set(body)
    if missing:
        raise StorageError(f"{path}: no manifest of a pair store, it lacks {', '.join(sorted(missing))}")
    return body


def newest(root: str | Path) -> tuple[int, dict[str, Any]] | None:
    """(number, manifest) of the newest generation, None when the store has never been sealed."""
    found = numbers(root)
    return (found[-1], load(root, found[-1])) if found else None


def names_of(spec: StoreSpec, draws: int) -> list[str]:
    """The names of all shards of `draws` draws, in their order."""
    return [shard_name(draw, shard) for draw in range(draws) for shard in range(spec.shards_per_draw)]


def build(root: str | Path, spec: StoreSpec, draws: int) -> dict[str, Any]:
    """The manifest of draws 0 to `draws` - 1, to be published; the newest itself if it holds exactly that.

    `content_digest` is over the payload digests alone, in order; `records` counts all draws; `moments` are
    pooled. Raises MissingShard, listing what is pending.
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
    parts = [found[name] for name in names]
    body = {
        "format": FORMAT,
        "generation": next_number(root),
        "draws": draws,
        "order_key": order_key(spec.source, spec.rows, draws),
        "content_digest": content_digest(part.payload_sha256 for part in parts),
        "records": sum(part.records for part in parts),
        "shards": [
            {
                "name": part.name,
                "payload": part.payload,
                "sha256": part.payload_sha256,
                "bytes": part.payload_bytes,
                "index": part.index,
                "index_sha256": part.index_sha256,
                "index_bytes": part.index_bytes,
                "records": part.records,
                "commit_sha256": hash_file(commits.commit_path(root, part.name))[0],
            }
            for part in parts
        ],
        "moments": pool((part.records * math.prod(spec.field("noise").shape), part.moments) for part in parts),
    }
    last = newest(root)
    if last is not None and all(last[1].get(key) == body[key] for key in body if key != "generation"):
        return last[1]
    return body


def seal(root: str | Path, draws: int, **provenance: Any) -> dict[str, Any]:
    """Publishes the generation of `draws` draws, unless the newest holds exactly that; returns its manifest.

    `provenance` adds keys to the manifest. For tests and for stores made without the pipeline.
    """
    body = build(root, read_spec(root), draws)
    number = int(body["generation"])
    if manifest_path(root, number).exists():
        return body
    if not create_json(manifest_path(root, number), provenance | body):
        raise StorageError(f"{manifest_path(root, number)}: another process sealed it just now; seal again")
    return load(root, number)
