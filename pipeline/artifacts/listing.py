"""Every artifact of a bucket in few requests: one listing for each stage and each store, one read for each artifact.

Sizes are of all files, as everywhere: a listing more for each thousand files that a store has.

What was read is noted in scratch by the tag of the object, which a listing tells: it is read once on each machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nfm.pipeline.artifacts.artifact import STORES
from nfm.pipeline.artifacts.ours import MANIFEST, is_foreign, lost_its_spec
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic, remote
from nfm.storage.files.copies import mirror
from nfm.storage.files.folder import Facts, below
from nfm.storage.files.paths import names_in, several
from nfm.storage.files.small_files import MOST_BYTES

Files = Mapping[str, Facts]


@dataclass(frozen=True)
class Listed:
    """An artifact in a bucket as its newest manifest tells of it, or its spec while there is none."""

    path: Path
    damaged: bool
    finished: bool
    inputs: list[str]
    bytes: int
    changed: float  # when its spec was written, Unix time


def listed(root: Path) -> list[Listed]:
    """The artifacts under a root in a bucket, by name. Raises StorageError."""
    stages = names_in(root)
    plain = [root / stage for stage in stages if stage != STORES]
    files: dict[Path, dict[str, Facts]] = {}
    for stage, found in zip(plain, several(root, below, plain)):
        for name, facts in found.items():
            fingerprint, _, rest = name.partition("/")
            files.setdefault(stage / fingerprint, {})[rest] = facts
    stores = [root / STORES / name for name in names_in(root / STORES)]
    files |= dict(zip(stores, several(root, below, stores)))  # each by itself, as one may have many thousand files
    ours = {path: names for path, names in files.items() if "spec.json" in names or lost_its_spec(path, names)}
    told = {path: _telling(names) for path, names in ours.items()}
    notes = _notes_of(root, {path / name: files[path][name].tag for path, name in told.items()})
    rows = [_row(path, told[path], notes[path / told[path]], files[path]) for path in sorted(told, key=str)]
    return [row for row in rows if not row.damaged or not is_foreign(row.path / "spec.json")]


def _telling(names: Files) -> str:
    """The file that tells most of an artifact."""
    return max((name for name in names if MANIFEST.fullmatch(name)), default="spec.json")


def _row(path: Path, name: str, note: Mapping[str, Any], names: Files) -> Listed:
    size = sum(facts.bytes for facts in names.values())
    damaged = note["damaged"] or "spec.json" not in names
    changed = names.get("spec.json", names[name]).changed
    return Listed(path, damaged, name != "spec.json", note["inputs"], size, changed)


def _notes_of(root: Path, tags: Mapping[Path, str]) -> dict[Path, Mapping[str, Any]]:
    """What these files say, by path. Those whose tag is noted on this machine are not read."""
    file = mirror.local_root(root) / "listing.json"
    known: dict[str, Any] = {}
    with contextlib.suppress(StorageError):  # there is none yet, or it is damaged: it is made anew
        known = atomic.read_json(file)["notes"]
    unknown = [path for path, tag in tags.items() if not tag or known.get(str(path), {}).get("tag") != tag]
    for path, body in zip(unknown, _read(root, unknown)):
        known[str(path)] = {"tag": tags[path] if body is not None else "", **_note(body)}
    notes: dict[Path, Mapping[str, Any]] = {path: known[str(path)] for path in tags}
    if unknown:
        with contextlib.suppress(StorageError):  # no room: it is read again next time
            atomic.write_json(file, {"notes": {str(path): note for path, note in notes.items()}})
    return notes


def _note(body: Mapping[str, Any] | None) -> dict[str, Any]:
    stated = (body or {}).get("inputs")
    inputs = [str(each.get("artifact")) for each in stated.values()] if isinstance(stated, dict) else []
    return {"damaged": body is None, "inputs": inputs}


def _read(root: Path, paths: Iterable[Path]) -> list[Mapping[str, Any] | None]:
    """The JSON of these files, many requests at the same time; None for what is damaged. What fails is read again."""
    paths, got = list(paths), []
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
