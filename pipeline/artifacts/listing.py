"""Every artifact of a bucket in few requests: one listing for each stage and each store, one read for each artifact."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nfm.pipeline.artifacts.artifact import STORES
from nfm.pipeline.artifacts.ours import is_foreign
from nfm.stages.stores.repair import bytes_told
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic, remote
from nfm.storage.files.paths import names_in, several, size_below
from nfm.storage.files.small_files import MOST_BYTES

_MANIFEST = re.compile(r"manifest(\.g\d+)?\.json")
Files = dict[str, tuple[int, float]]  # name -> (bytes, Unix time of the last change)


@dataclass(frozen=True)
class Listed:
    """An artifact in a bucket: its newest manifest, or its spec while there is none; None if that is unreadable."""

    path: Path
    body: Mapping[str, Any] | None
    finished: bool
    bytes: int
    changed: float  # when its spec was written, Unix time


def listed(root: Path) -> list[Listed]:
    """The artifacts under a root in a bucket, by name. Raises StorageError."""
    stages = names_in(root)
    plain = [root / stage for stage in stages if stage != STORES]
    files: dict[Path, Files] = {}
    for stage, found in zip(plain, several(root, _below, plain)):
        for name, facts in found.items():
            fingerprint, _, rest = name.partition("/")
            files.setdefault(stage / fingerprint, {})[rest] = facts
    stores = [root / STORES / name for name in names_in(root / STORES)]
    files |= dict(zip(stores, several(root, _directly_in, stores)))
    told = {path: path / _telling(names) for path, names in files.items() if "spec.json" in names}
    bodies = dict(zip(told, _read(root, list(told.values()))))
    rows = [_row(path, told[path].name, bodies[path], files[path]) for path in sorted(told, key=str)]
    return [row for row in rows if row.body is not None or not is_foreign(row.path / "spec.json")]


def _telling(names: Files) -> str:
    """The file that tells most of an artifact."""
    return max((name for name in names if _MANIFEST.fullmatch(name)), default="spec.json")


def _row(path: Path, name: str, body: Mapping[str, Any] | None, names: Files) -> Listed:
    size = sum(size for size, _ in names.values())
    if path.parent.name == STORES:  # its shards were not listed
        told = bytes_told(body or {})
        size = size_below(path) if told is None else told
    return Listed(path, body, name != "spec.json", size, names["spec.json"][1])


def _below(folder: Path) -> Files:
    """All files below a folder, by path relative to it: 1,000 in a request."""
    found = remote.attempt(folder, "list", lambda fs, name: fs.find(name, detail=True))
    return {name.removeprefix(_key(folder) + "/"): _facts(facts) for name, facts in found.items()}


def _directly_in(folder: Path) -> Files:
    with contextlib.suppress(FileNotFoundError):
        found = remote.attempt(folder, "list", lambda fs, name: fs.ls(name, detail=True, refresh=True))
        return {str(item["name"]).rpartition("/")[2]: _facts(item) for item in found if item["type"] == "file"}
    return {}


def _facts(facts: Mapping[str, Any]) -> tuple[int, float]:
    changed = facts.get("LastModified")
    return int(facts["size"]), changed.timestamp() if changed is not None else time.time()


def _read(root: Path, paths: list[Path]) -> list[Mapping[str, Any] | None]:
    """The JSON of these files, all requests at the same time; None for what is damaged. What fails is read again."""
    got: Any = []
    if paths:
        names, starts, ends = [_key(path) for path in paths], [0] * len(paths), [MOST_BYTES] * len(paths)
        got = remote.attempt(root, "read", lambda fs, _: fs.cat_ranges(names, starts, ends, on_error="return"))
    return [_checked(path, data) for path, data in zip(paths, got)]


def _checked(path: Path, data: object) -> Mapping[str, Any] | None:
    with contextlib.suppress(StorageError):
        return atomic.checked(path, data) if isinstance(data, bytes) else atomic.read_json(path)
    with contextlib.suppress(StorageError):  # damaged on the way, or in the bucket
        return atomic.read_json(path)
    return None


def _key(path: Path) -> str:
    return str(getattr(path, "path")).rstrip("/")  # noqa: B009 not an attribute of pathlib's paths
