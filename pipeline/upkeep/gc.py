"""Garbage: what killed attempts and repairs left behind, and the artifacts that nothing depends on.

A killed gc leaves every artifact whole or visibly unfinished: its manifests go first, then its commits, then the rest,
and its `spec.json` last.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nfm.pipeline.artifacts import lock
from nfm.pipeline.artifacts.artifact import Artifact
from nfm.pipeline.config import RunConfig
from nfm.pipeline.upkeep import needed as gc_needed
from nfm.pipeline.upkeep.needed import IDLE_SECONDS, Standing
from nfm.stages.display import units
from nfm.stages.stores import leftovers
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.files.paths import size_of

Say = Callable[[str], None]
BESIDE = ("events", "audits", "failed")  # what a store's own check of its files passes over
WHY = {
    "attempt": "its worker was killed before the commit",
    "temporary": "its writer was killed",
    "quarantine": "set aside by nfm repair",
}


@dataclass(frozen=True)
class Garbage:
    """One thing that may go: an artifact, or leftovers in one; `name` is relative to the root."""

    kind: str  # attempt, temporary, quarantine, artifact or remains
    name: str
    folder: Path  # of the artifact that it is, or lies in
    files: int
    bytes: int
    reason: str
    paths: tuple[Path, ...] = ()  # of leftovers; an artifact goes with all that is in its folder


@dataclass
class Listing:
    """What may go, in the order in which it goes, and what stays though people may wonder: (name, reason)."""

    going: list[Garbage] = field(default_factory=list)
    staying: list[tuple[str, str]] = field(default_factory=list)


def listing(configs: Sequence[RunConfig], older_than: float) -> Listing:
    """All garbage under the root; `older_than` in seconds. Reads only."""
    found = Listing()
    held = gc_needed.survey(configs, older_than)
    for one in held:
        if one.damage or one.locked:
            found.staying.append((one.name, one.why))
        elif one.why:
            found.going += _leftovers(one.path, one.store)
    unneeded = [one for one in held if not one.why]
    found.going += [_whole(one) for one in _dependants_first(unneeded)]
    return found


def remove(found: Iterable[Garbage], older_than: float, say: Say) -> list[Garbage]:
    """Remove garbage under the locks of its artifacts, and return what went.

    What became needed since it was listed stays, and so does what somebody works on; `say` is told. Raises OSError
    where a file cannot be removed.
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
        if not (folder / "spec.json").exists():
            with contextlib.suppress(OSError):  # somebody begins it anew
                folder.rmdir()
    return gone


def as_text(found: Listing) -> str:
    """The list for people, with sizes and reasons."""
    lines = [f"{one.kind:10}  {units.size(one.bytes):>9}  {one.name}  ({one.reason})" for one in found.going]
    lines += [f"{'stays':10}  {'':9}  {name}  ({reason})" for name, reason in found.staying]
    return "\n".join(lines)


def total(found: Sequence[Garbage]) -> str:
    """`3 artifacts, 2 attempts: 41 files, 1.2 MB`."""
    kinds = dict.fromkeys(one.kind for one in found)
    counts = {kind: sum(one.kind == kind for one in found) for kind in kinds}
    plural = {"temporary": "temporaries", "artifact": "artifacts", "attempt": "attempts"}
    words = [f"{count} {plural.get(kind, kind) if count > 1 else kind}" for kind, count in counts.items()]
    files, size = sum(one.files for one in found), sum(one.bytes for one in found)
    return f"{', '.join(words)}: {files} files, {units.size(size)}"


def _leftovers(folder: Path, store: bool) -> list[Garbage]:
    """What may go from an artifact that stays."""
    prefix, found = f"{folder.parent.name}/{folder.name}", list[Garbage]()
    now = time.time()
    for part in [folder / name for name in BESIDE] if store else [folder]:
        for path in _files(part):
            if not atomic.is_temporary(path):
                continue
            with contextlib.suppress(FileNotFoundError):  # published just now
                facts, name = path.lstat(), f"{prefix}/{path.relative_to(folder)}"
                if now - facts.st_mtime >= IDLE_SECONDS:
                    found.append(Garbage("temporary", name, folder, 1, facts.st_size, WHY["temporary"], (path,)))
    with contextlib.suppress(StorageError):  # it became unreadable since it was looked at
        for one in leftovers.leftovers(folder) if store else ():
            if now - one.since >= IDLE_SECONDS:
                name, count = f"{prefix}/{one.name}", len(one.files)
                found.append(Garbage(one.kind, name, folder, count, one.bytes, WHY[one.kind], one.files))
    return found


def _whole(held: Standing) -> Garbage:
    count = size = 0
    for path in _files(held.path):
        if not gc_needed.of_lock(path.name):
            count, size = count + 1, size + (size_of(path) or 0)
    if not held.stage:
        return Garbage("remains", held.name, held.path, count, size, "an empty folder")
    unfinished = "" if any(held.path.glob("manifest*.json")) else ", and it is not finished"
    return Garbage("artifact", held.name, held.path, count, size, f"nothing depends on it{unfinished}")


def _dependants_first(unneeded: Sequence[Standing]) -> list[Standing]:
    """The order in which each goes before what it was made from."""
    waiting, ordered = {held.name: held for held in unneeded}, list[Standing]()
    while waiting:
        needed = {name for held in waiting.values() for name in held.inputs}
        free = [held for name, held in waiting.items() if name not in needed]
        for held in free or list(waiting.values()):
            ordered.append(waiting.pop(held.name))
    return ordered


def _take(folder: Path, batch: list[Garbage], older_than: float, say: Say, check: Callable[[], None]) -> list[Garbage]:
    """Remove what was listed of one folder, asked again now that its lock is ours."""
    if batch[0].kind in ("artifact", "remains"):
        user = gc_needed.user_of(batch[0].name)
        why = f"{user} was made from it" if user else ""
        if (folder / "spec.json").exists():  # else only the folder tells its age, and our lock has just changed that
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
        _unlink(one.paths)
        for parent in sorted({path.parent for path in one.paths}, key=lambda path: -len(path.parts)):
            _remove_empty(parent, folder)
    return gone


def _is_store(folder: Path) -> bool:
    return "store" in Artifact(folder).spec


def _remove_artifact(folder: Path, check: Callable[[], None]) -> None:
    """Manifests, commits, the rest, `spec.json`: whatever is killed in between is no finished artifact."""
    check()
    _unlink(folder.glob("manifest*.json"))
    _flush(folder)
    commits = folder / "commits"
    if commits.is_dir() and not commits.is_symlink():  # what a link leads to is not this artifact's
        _unlink(path for path in commits.iterdir() if path.is_symlink() or not path.is_dir())
        _flush(commits)
    check()
    last = folder / "spec.json"
    _unlink(path for path in _files(folder) if path != last and not gc_needed.of_lock(path.name))
    for inside, folders, _ in os.walk(folder, topdown=False):
        for name in folders:
            os.rmdir(os.path.join(inside, name))
    _flush(folder)
    last.unlink(missing_ok=True)
    _unlink(folder.glob("lock.*.taken"))  # of takers that were killed, as are these:
    atomic.clear_temporaries(folder)


def _files(folder: Path) -> Iterator[Path]:
    """Every file below a folder, and every link, which is not followed, not even the folder's own."""
    if folder.is_symlink():
        return
    for inside, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(inside, name))]
        yield from (Path(inside, name) for name in [*names, *links])


def _unlink(files: Iterable[Path]) -> None:
    for path in files:
        path.unlink(missing_ok=True)


def _remove_empty(folder: Path, root: Path) -> None:
    """Remove a folder that is empty now, and those above it, below `root`; the store's own folders stay."""
    own = {root / name for name in ("shards", "index", "commits", "fields")}
    while folder != root and folder not in own and root in folder.parents:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def _flush(folder: Path) -> None:
    """Make removals durable before others begin: after a power cut a manifest must not come back over a hole."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
