"""Manifests: where they are, and how they are found and read."""

from __future__ import annotations

import re
from pathlib import Path

from nfm.storage.errors import NoPlace, StorageError
from nfm.storage.files.atomic import read_json
from nfm.storage.files.paths import as_path, exists, names_in, size_of
from nfm.storage.format import untrusted
from nfm.storage.format.spec import StoreSpec, read_spec
from nfm.storage.ledger import generation
from nfm.storage.ledger.generation import PART_OF, Generation
from nfm.storage.ledger.shard_list import is_list_name

_MANIFEST = re.compile(r"manifest\.g(\d{4,})\.json")


def manifest_path(root: str | Path, number: int) -> Path:
    """The path of the manifest of a generation."""
    return generation.manifest_path(as_path(root), number)


def pinned(where: str | Path) -> tuple[Path, int | None]:
    """(the folder of a store, the generation whose manifest `where` is); None if it is the folder itself."""
    root = as_path(where)
    if _MANIFEST.fullmatch(root.name) and size_of(root) is not None:
        return root.parent, untrusted.integer(f"{root}: generation", read_json(root).get("generation", 0))
    return root, None


def numbers(root: str | Path) -> list[int]:
    """The sealed generations of a store, ascending."""
    found = (_MANIFEST.fullmatch(name) for name in names_in(as_path(root)))
    return sorted(int(match[1]) for match in found if match)


def next_number(root: str | Path) -> int:
    """The number of the next generation; the first is 1. A number that a repair set aside is not used again."""
    quarantine = as_path(root) / "quarantine"
    aside = [number for name in names_in(quarantine) for number in numbers(quarantine / name)]
    return max([*numbers(root), *aside], default=0) + 1


def load(root: str | Path, number: int, spec: StoreSpec | None = None) -> Generation:
    """A sealed generation of the store, whose recipe is read unless it is given. Raises StorageError or NewerSchema."""
    path = manifest_path(root, number)
    if not exists(path):
        listed = ", ".join(map(str, numbers(root))) or "none"
        raise NoPlace(str(path), f"no such generation (sealed: {listed}); choose one of these or seal the store")
    return Generation(path.parent, spec or read_spec(root), number, read_json(path))


def newest_number(root: str | Path) -> int:
    """The number of the newest generation, 0 if there is none. One that is part of a larger one is not the newest.

    A manifest that cannot be read counts as the newest, so that whoever opens it tells of the damage.
    """
    found = numbers(root)
    for at in range(len(found) - 1, 0, -1):
        try:
            whole = read_json(manifest_path(root, found[at])).get(PART_OF)
        except StorageError:
            return found[at]
        if whole not in found[:at]:  # also where a repair set the larger one aside
            return found[at]
    return found[0] if found else 0


def newest(root: str | Path, spec: StoreSpec | None = None) -> Generation | None:
    """The newest generation, see `newest_number`; None if the store has never been sealed."""
    number = newest_number(root)
    return load(root, number, spec) if number else None


def files_of(root: str | Path, number: int) -> list[Path]:
    """The files of a generation at the root of the store, found by name: its manifest, then its lists of shards."""
    where, path = as_path(root), manifest_path(root, number)
    lists = [name for name in names_in(where) if is_list_name(name) and name.startswith(f"{path.stem}.")]
    return [path for path in (path, *(where / name for name in lists)) if exists(path)]
