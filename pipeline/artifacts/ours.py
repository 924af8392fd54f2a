"""Finds the folders that are artifacts: those with a `spec.json` of ours.

The root may also hold a user's own folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from nfm.storage.errors import StorageError
from nfm.storage.files.paths import exists, is_remote, names_in, several
from nfm.storage.files.small_files import read_bytes

KEYS = {"store", "stage", "fingerprint", "digest"}  # every spec of ours has at least one of them
FINGERPRINT = re.compile("[0-9a-f]{12}")
MANIFEST = re.compile(r"manifest(\.g\d+)?\.json")


def is_foreign(spec: Path) -> bool:
    """Whether a `spec.json` belongs to another program: valid JSON without any of our keys, and no manifest of ours
    beside it. A damaged one may be ours.
    """
    try:
        body = json.loads(read_bytes(spec))
    except (StorageError, OSError, ValueError):
        return False
    return not (isinstance(body, dict) and KEYS & body.keys()) and not lost_its_spec(spec.parent)


def lost_its_spec(folder: Path, names: Iterable[str] | None = None) -> bool:
    """Whether a folder without a `spec.json` of ours is an artifact all the same: by its name, and a manifest in it.

    `names` are those of its files, where they are known.
    """
    if FINGERPRINT.fullmatch(folder.name) is None:
        return False
    return any(map(MANIFEST.fullmatch, names_in(folder) if names is None else names))


def folders(root: Path) -> list[Path]:
    """The folders under a root that may be artifacts, by name. In a bucket, one request for each stage."""
    if not is_remote(root):
        return sorted(root.glob("*/*"))
    stages = [root / name for name in names_in(root)]
    return [stage / name for stage, names in zip(stages, several(root, names_in, stages)) for name in names]


def of_ours(found: Iterable[Path]) -> list[Path]:
    """The `spec.json` of those of these folders that are artifacts."""
    specs = [folder / "spec.json" for folder in found]
    kept = several(specs[0], _is_ours, specs) if specs else []
    return [spec for spec, ours in zip(specs, kept) if ours]


def specs(root: Path) -> list[Path]:
    """The `spec.json` of every artifact under a root."""
    return of_ours(folders(root))


def _is_ours(spec: Path) -> bool:
    return not is_foreign(spec) if exists(spec) else lost_its_spec(spec.parent)
