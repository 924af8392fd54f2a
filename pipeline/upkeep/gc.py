"""Garbage: leftovers of killed attempts and repairs, and artifacts that nothing depends on.

If gc is killed, every artifact is either complete or visibly unfinished: its manifests are removed first, then its
commits, then the rest, and its `spec.json` last.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nfm.pipeline.artifacts import lock
from nfm.pipeline.artifacts.artifact import Artifact
from nfm.pipeline.config import RunConfig
from nfm.pipeline.graph import STAGES
from nfm.pipeline.upkeep import needed as gc_needed
from nfm.pipeline.upkeep.needed import IDLE_SECONDS, MAKING, Standing
from nfm.stages.display import units
from nfm.stages.stores import leftovers
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic, paths
from nfm.storage.files.copies import resume
from nfm.storage.files.durable import sync_folder
from nfm.storage.files.folder import below
from nfm.storage.files.paths import exists, is_remote, several

Say = Callable[[str], None]
BESIDE = ("events", "audits", "failed")  # folders that a store's own check of its files ignores
WHY = {
    "attempt": "its worker was killed before the commit",
    "temporary": "its writer was killed",
    "part": "of a stage that is finished",
    "state": "of a training that is finished",
    "quarantine": "set aside by nfm repair",
}


@dataclass(frozen=True)
class Garbage:
    """One thing that may be removed: an artifact, or leftovers in one. `name` is relative to the root."""

    kind: str  # attempt, temporary, state, quarantine, artifact or remains
    name: str
    folder: Path  # of the artifact, or of the artifact that holds the leftovers
    files: int
    bytes: int
    reason: str
    paths: tuple[Path, ...] = ()  # of leftovers; an artifact is removed with its whole folder


@dataclass
class Listing:
    """What may be removed, in order of removal, and what is kept although users may not expect it: (name, reason)."""

    going: list[Garbage] = field(default_factory=list)
    staying: list[tuple[str, str]] = field(default_factory=list)


def listing(configs: Sequence[RunConfig], older_than: float) -> Listing:
    """All garbage under the root. `older_than` is in seconds. Only reads."""
    found = Listing()
    held = gc_needed.survey(configs, older_than)
    for one in held:
        if one.damage or one.locked or one.why == MAKING:
            found.staying.append((one.name, one.why))
        elif one.why:
            found.going += _leftovers(one.path, one.store)
    unneeded = [one for one in held if not one.why]
    found.going += [_whole(one) for one in _dependants_first(unneeded)]
    return found


def remove(found: Iterable[Garbage], older_than: float, say: Say) -> list[Garbage]:
    """Removes garbage under the locks of its artifacts. Returns what was removed.

    What became needed since the listing is kept, and so is what another process works on; `say` reports it. Raises
    OSError if a file cannot be removed.
    """
    gone, waiting = list[Garbage](), list(found)
    while waiting:
        folder = waiting[0].folder
        batch = [one for one in waiting if one.folder == folder]
        waiting = [one for one in waiting if one.folder != folder]
        try:
            with lock.Lock(folder) as ours:
                gone += _take(folder, batch, older_than, say, ours.check)
        except lock.Held as error:
            say(f"stays: {error}")
        if not is_remote(folder) and not (folder / "spec.json").exists():
            with contextlib.suppress(OSError):  # another process starts it again
                folder.rmdir()
    return gone


def as_text(found: Listing) -> str:
    """The list as text, with sizes and reasons."""
    lines = [f"{one.kind:10}  {units.size(one.bytes):>9}  {one.name}  ({one.reason})" for one in found.going]
    lines += [f"{'stays':10}  {'':9}  {name}  ({reason})" for name, reason in found.staying]
    return "\n".join(lines)


def total(found: Sequence[Garbage]) -> str:
    """`3 artifacts, 2 attempts: 41 files, 1.2 MB`."""
    kinds = dict.fromkeys(one.kind for one in found)
    counts = {kind: sum(one.kind == kind for one in found) for kind in kinds}
    plural = {"temporary": "temporaries", "part": "parts", "artifact": "artifacts", "attempt": "attempts"}
    words = [f"{count} {plural.get(kind, kind) if count > 1 else kind}" for kind, count in counts.items()]
    files, size = sum(one.files for one in found), sum(one.bytes for one in found)
    return f"{', '.join(words)}: {units.number_of(files, 'file')}, {units.size(size)}"


def _leftovers(folder: Path, store: bool) -> list[Garbage]:
    """What may be removed from an artifact that is kept."""
    prefix, found = f"{folder.parent.name}/{folder.name}", list[Garbage]()
    now = time.time()
    for part in [f"{name}/" for name in BESIDE] if store else [""]:
        files = below(folder / part if part else folder)
        for name, facts in files.items():
            if atomic.is_temporary(name) and now - facts.changed >= IDLE_SECONDS:
                whole, path = f"{prefix}/{part}{name}", folder / f"{part}{name}"
                found.append(Garbage("temporary", whole, folder, 1, facts.bytes, WHY["temporary"], (path,)))
        for kind, name in _working(folder) if not store and "manifest.json" in files else ():
            below_it = {file: facts for file, facts in files.items() if file.startswith(f"{name}/")}
            if below_it and all(now - facts.changed >= IDLE_SECONDS for facts in below_it.values()):
                size, left = sum(facts.bytes for facts in below_it.values()), tuple(folder / file for file in below_it)
                found.append(Garbage(kind, f"{prefix}/{name}", folder, len(left), size, WHY[kind], left))
    with contextlib.suppress(StorageError):  # it became unreadable since it was checked
        for one in leftovers.leftovers(folder) if store else ():
            if now - one.since >= IDLE_SECONDS:
                name, count = f"{prefix}/{one.name}", len(one.files)
                found.append(Garbage(one.kind, name, folder, count, one.bytes, WHY[one.kind], one.files))
    return found


def _working(folder: Path) -> list[tuple[str, str]]:
    """(kind, folder) of what only the making of an artifact needed."""
    names = getattr(STAGES.get(folder.parent.name), "WORKING", ())
    states = [("state", resume.FOLDER)] if is_remote(folder) else []
    return [*states, *(("part", name) for name in names)]


def _whole(held: Standing) -> Garbage:
    files = {name: facts for name, facts in below(held.path).items() if not _of_lock(name)}
    count, size = len(files), sum(facts.bytes for facts in files.values())
    if not held.stage:
        return Garbage("remains", held.name, held.path, count, size, "an empty folder")
    unfinished = "" if gc_needed.manifests_in(held.path) else ", and it is not finished"
    return Garbage("artifact", held.name, held.path, count, size, f"nothing depends on it{unfinished}")


def _dependants_first(unneeded: Sequence[Standing]) -> list[Standing]:
    """The order in which each artifact is removed before those that it was made from."""
    waiting, ordered = {held.name: held for held in unneeded}, list[Standing]()
    while waiting:
        needed = {name for held in waiting.values() for name in held.inputs}
        free = [held for name, held in waiting.items() if name not in needed]
        for held in free or list(waiting.values()):
            ordered.append(waiting.pop(held.name))
    return ordered


def _take(folder: Path, batch: list[Garbage], older_than: float, say: Say, check: Callable[[], None]) -> list[Garbage]:
    """Removes what was listed of one folder, after checking it again under its lock."""
    if batch[0].kind in ("artifact", "remains"):
        user = gc_needed.user_of(batch[0].name)
        why = f"{user} was made from it" if user else ""
        if exists(folder / "spec.json"):  # otherwise only the folder shows its age, which our lock has just changed
            why = why or gc_needed.recently(folder, older_than, time.time())
        if why:
            say(f"stays: {batch[0].name}: {why}")
            return []
        _remove_artifact(folder, check)
        return batch
    still = {path for one in _leftovers(folder, _is_store(folder)) for path in one.paths}
    gone = [one for one in batch if still.issuperset(one.paths)]
    for one in gone:
        check()
        several(folder, paths.remove, one.paths)
        for parent in (
            () if is_remote(folder) else sorted({path.parent for path in one.paths}, key=lambda path: -len(path.parts))
        ):
            _remove_empty(parent, folder)
    return gone


def _is_store(folder: Path) -> bool:
    return "store" in Artifact(folder).spec


def _remove_artifact(folder: Path, check: Callable[[], None]) -> None:
    """Removes manifests, commits, the rest, then `spec.json`.

    If it is killed in between, the artifact is not finished.
    """
    check()
    _remove_files(folder, gc_needed.manifests_in(folder))
    _remove_files(folder, [name for name in below(folder) if name.startswith("commits/")])
    check()
    several(
        folder, paths.remove, [folder / name for name in below(folder) if name != "spec.json" and not _of_lock(name)]
    )
    if is_remote(folder):
        paths.remove(folder / "spec.json")
        return
    for inside, folders, _ in os.walk(folder, topdown=False):
        for name in folders:
            os.rmdir(os.path.join(inside, name))
    sync_folder(folder)
    (folder / "spec.json").unlink(missing_ok=True)
    for path in folder.glob("lock.*.taken"):  # of killed takeovers, as are these:
        path.unlink(missing_ok=True)
    atomic.clear_temporaries(folder)


def _remove_files(folder: Path, names: Sequence[str]) -> None:
    """Removes files of an artifact. On a disk it is durable before others are removed: after a power cut, a manifest
    must not reappear without its shards.
    """
    several(folder, paths.remove, [folder / name for name in names])
    if not is_remote(folder):
        for parent in {(folder / name).parent for name in names}:
            sync_folder(parent)


def _of_lock(name: str) -> bool:
    return gc_needed.of_lock(name.rpartition("/")[2])


def _remove_empty(folder: Path, root: Path) -> None:
    """Removes an empty folder, and empty folders above it, below `root`. The store's own folders stay."""
    own = {root / name for name in ("shards", "index", "commits", "fields")}
    while folder != root and folder not in own and root in folder.parents:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
