"""Files that killed attempts and repairs leave in a pair store. They are harmless, and nothing reads them."""

from __future__ import annotations

import calendar
import re
import time
from dataclasses import dataclass
from pathlib import Path

from nfm.stages.stores.repair import damaged_manifests
from nfm.storage import verify as storage_verify
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic, folder
from nfm.storage.files.folder import Facts
from nfm.storage.ledger import commits, seal

_OF_A_SHARD = re.compile(r"(?:shards|index)/((d\d+-s\d+)\.[^/.]+)")
QUARANTINE = "quarantine"
_MANIFEST = re.compile(r"manifest\.g(\d{4,})\.json")


@dataclass(frozen=True)
class Leftover:
    """Files of a store that are removed together. `since` is the last change of any of them (Unix time)."""

    kind: str  # attempt, temporary or quarantine
    name: str  # relative to the store
    files: tuple[Path, ...]
    bytes: int
    since: float


def leftovers(store: Path) -> list[Leftover]:
    """Everything that may be removed from a store, by attempt and by repair; nothing while a manifest is unreadable.

    Raises StorageError if its recipe is unreadable, and NewerSchema.
    """
    if damaged_manifests(store):
        return []
    return [*_orphans(store), *_quarantined(store)]


def _orphans(store: Path) -> list[Leftover]:
    """Temporary files, and the files of attempts without a commit.

    All files of an attempt get the same age: its payload may be unchanged while its index part is being written.
    """
    groups: dict[str, list[str]] = {}
    doubtful: dict[str, bool] = {}
    for file in storage_verify.orphans(store):
        match = _OF_A_SHARD.match(file)
        if match is not None:
            shard = match[2]
            if shard not in doubtful:
                doubtful[shard] = _unreadable(store, shard)
            if doubtful[shard]:
                continue  # left to `nfm repair`: it is unknown which attempt was committed
        groups.setdefault(match[1] if match is not None else file, []).append(file)
    kinds = {name: "temporary" if atomic.is_temporary(name) else "attempt" for name in groups}
    facts = folder.below(store) if groups else {}
    return [
        _leftover(kinds[name], name, store, {file: facts[file] for file in files})
        for name, files in groups.items()
        if facts.keys() >= set(files)  # else some were removed meanwhile
    ]


def _unreadable(store: Path, shard: str) -> bool:
    try:
        commits.read(store, shard)
    except StorageError:
        return True
    return False


def _quarantined(store: Path) -> list[Leftover]:
    """The files that each repair set aside.

    A manifest stays until a later generation is sealed. Its number must never be used for other content, and the next
    number follows from the existing ones.
    """
    newest = max(seal.numbers(store), default=0)
    repairs: dict[str, dict[str, Facts]] = {}
    for name, facts in folder.below(store / QUARANTINE).items():
        repair, _, file = name.partition("/")
        numbered = _MANIFEST.fullmatch(file.rpartition("/")[2])
        if file and (numbered is None or int(numbered[1]) < newest):
            repairs.setdefault(repair, {})[f"{QUARANTINE}/{name}"] = facts
    return [
        _leftover("quarantine", f"{QUARANTINE}/{repair}", store, files, _set_aside_at(repair))
        for repair, files in sorted(repairs.items())
    ]


def _set_aside_at(name: str) -> float | None:
    """When a repair filled its folder, by the folder's name: moved files keep their own times."""
    try:
        return float(calendar.timegm(time.strptime(name, "%Y%m%dT%H%M%SZ")))
    except ValueError:
        return None


def _leftover(kind: str, name: str, store: Path, files: dict[str, Facts], since: float | None = None) -> Leftover:
    if since is None:
        since = max(facts.changed for facts in files.values())
    size = sum(facts.bytes for facts in files.values())
    return Leftover(kind, name, tuple(store / file for file in files), size, since)
