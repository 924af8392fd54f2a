"""Manifests: where they are, and how they are read and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nfm.storage.errors import StorageError
from nfm.storage.files.atomic import read_json
from nfm.storage.files.paths import as_path, exists, names_in
from nfm.storage.format import untrusted
from nfm.storage.format.commit import check_files
from nfm.storage.format.moments import check_moments
from nfm.storage.format.spec import check_format, parse_name
from nfm.storage.ledger.shard_list import MOST, is_list_name, read_list

_MOST_DRAWS = 1000
_NEEDED = {"generation", "draws", "order_key", "content_digest", "records", "shards"}
_ENTRY = {"name", "payload", "sha256", "bytes", "index", "index_sha256", "index_bytes", "records", "commit_sha256"}


def manifest_path(root: str | Path, generation: int) -> Path:
    """The path of the manifest of a generation."""
    return as_path(root) / f"manifest.g{generation:04d}.json"


def numbers(root: str | Path) -> list[int]:
    """The sealed generations of a store, ascending."""
    found = (re.fullmatch(r"manifest\.g(\d{4,})\.json", name) for name in names_in(as_path(root)))
    return sorted(int(match[1]) for match in found if match)


def next_number(root: str | Path) -> int:
    """The number of the next generation; the first is 1. A number that a repair set aside is not used again."""
    quarantine = as_path(root) / "quarantine"
    aside = [number for name in names_in(quarantine) for number in numbers(quarantine / name)]
    return max([*numbers(root), *aside], default=0) + 1


def load(root: str | Path, generation: int) -> dict[str, Any]:
    """The manifest of a generation, with any extra keys. `shards` is a sequence of entries, wherever they are stored.

    Raises StorageError or NewerSchema.
    """
    return whole(root, raw(root, generation))


def raw(root: str | Path, generation: int) -> dict[str, Any]:
    """The manifest as it is written. `shards` may refer to another file, which is not read."""
    path = manifest_path(root, generation)
    if not exists(path):
        listed = ", ".join(map(str, numbers(root))) or "none"
        raise StorageError(f"{path}: no such generation (sealed: {listed}); choose one of these or seal the store")
    body = read_json(path)
    check_format(path, body)
    if missing := _NEEDED - set(body):
        raise StorageError(f"{path}: no manifest of a pair store, it lacks {', '.join(sorted(missing))}")
    if untrusted.integer(f"{path}: generation", body["generation"], 1) != generation:
        raise StorageError(f"{path}: is the manifest of generation {body['generation']}; restore it from a copy")
    untrusted.integer(f"{path}: draws", body["draws"], 1, _MOST_DRAWS)
    untrusted.integer(f"{path}: records", body["records"], 1)
    for key in ("order_key", "content_digest"):
        untrusted.sha256(f"{path}: {key}", body[key])
    if "moments" in body:
        check_moments(f"{path}: moments", body["moments"])
    _check_later(path, body)
    for entry in untrusted.sequence(f"{path}: excluded", body.get("excluded", ()), MOST):
        _check_excluded(f"{path}: excluded", untrusted.mapping(f"{path}: an excluded shard", entry))
    return body


def whole(root: str | Path, body: dict[str, Any]) -> dict[str, Any]:
    """A manifest from `raw`, with its entries."""
    path = manifest_path(root, body["generation"])
    if isinstance(body["shards"], Mapping):
        return body | {"shards": read_list(as_path(root), str(path), body["generation"], body["shards"])}
    for entry in untrusted.sequence(f"{path}: shards", body["shards"], MOST):
        _check_entry(path, untrusted.mapping(f"{path}: a shard", entry))
    return body


def newest(root: str | Path) -> tuple[int, dict[str, Any]] | None:
    """(number, manifest) of the newest generation; None if the store has never been sealed."""
    found = numbers(root)
    return (found[-1], load(root, found[-1])) if found else None


def files_of(root: str | Path, generation: int) -> list[Path]:
    """The files of a generation at the root of the store, found by name: its manifest, then its lists of shards."""
    where, path = as_path(root), manifest_path(root, generation)
    lists = [name for name in names_in(where) if is_list_name(name) and name.startswith(f"{path.stem}.")]
    return [path for path in (path, *(where / name for name in lists)) if exists(path)]


def _check_later(path: Path, body: Mapping[str, Any]) -> None:
    """Checks keys that older generations do not have."""
    for key in ("bytes", "shard_count", "clipped"):
        if key in body:
            untrusted.integer(f"{path}: {key}", body[key])
    if body.get("noise_error") is not None and untrusted.real(f"{path}: noise_error", body["noise_error"]) < 0:
        raise StorageError(f"{path}: noise_error {body['noise_error']} is negative; restore it from a copy")
    for precision in untrusted.sequence(f"{path}: precision", body.get("precision", ()), 1000):
        untrusted.text(f"{path}: precision", precision)
    for size in untrusted.sequence(f"{path}: batch_sizes", body.get("batch_sizes", ()), MOST):
        untrusted.integer(f"{path}: batch_sizes", size)


def _check_excluded(where: str, entry: Mapping[str, Any]) -> None:
    if missing := {"name", "slots", "records", "reason"} - set(entry):
        raise StorageError(f"{where}: a shard lacks {', '.join(sorted(missing))}; restore it from a copy")
    name = untrusted.text(f"{where}: the name of a shard", entry["name"], most=40)
    parse_name(name)
    slots = [untrusted.integer(f"{where}: slots", slot) for slot in untrusted.sequence(where, entry["slots"], 2)]
    if len(slots) != 2 or untrusted.integer(f"{where}: records", entry["records"], 1) != slots[1] - slots[0]:
        raise StorageError(f"{where}: {name}: its slots and records contradict each other; restore it from a copy")
    untrusted.text(f"{where}: reason", entry["reason"])


def _check_entry(path: Path, entry: Mapping[str, Any]) -> None:
    if missing := _ENTRY - set(entry):
        raise StorageError(f"{path}: a shard lacks {', '.join(sorted(missing))}; restore it from a copy")
    name = untrusted.text(f"{path}: the name of a shard", entry["name"], most=40)
    parse_name(name)
    check_files(f"{path}: {name}", entry, name, "")
    untrusted.sha256(f"{path}: {name}: commit_sha256", entry["commit_sha256"])
