"""Finds the folders that are artifacts: those with a `spec.json` of ours.

The root may also hold a user's own folders.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from nfm.storage.errors import StorageError
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


def specs(root: Path) -> list[Path]:
    """The `spec.json` of every artifact under a root."""
    return [path for path in sorted(root.glob("*/*/spec.json")) if not is_foreign(path)]
