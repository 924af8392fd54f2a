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


def is_foreign(spec: Path) -> bool:
    """Whether a `spec.json` belongs to another program: valid JSON without any of our keys.

    A damaged one may be ours.
    """
    try:
        body = json.loads(read_bytes(spec))
    except (StorageError, OSError, ValueError):
        return False
    return not (isinstance(body, dict) and KEYS & body.keys())


def folders(root: Path) -> list[Path]:
    """The folders under a root that may be artifacts, by name. In a bucket, one request for each stage."""
    if not is_remote(root):
        return sorted(root.glob("*/*"))
    stages = [root / name for name in names_in(root)]
    return [stage / name for stage, names in zip(stages, several(root, names_in, stages)) for name in names]


def of_ours(found: Iterable[Path]) -> list[Path]:
    """The `spec.json` of those of these folders that are artifacts."""
    specs = [folder / "spec.json" for folder in found]
    if specs and not is_remote(specs[0]):
        specs = [spec for spec in specs if spec.exists()]
    kept = several(specs[0], _is_ours, specs) if specs else []
    return [spec for spec, ours in zip(specs, kept) if ours]


def specs(root: Path) -> list[Path]:
    """The `spec.json` of every artifact under a root."""
    return of_ours(folders(root))


def _is_ours(spec: Path) -> bool:
    if is_remote(spec) and not exists(spec):
        return False
    return not is_foreign(spec)
