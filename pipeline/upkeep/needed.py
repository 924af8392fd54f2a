"""Which artifacts are needed, and why. Nothing depends on the others."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nfm.pipeline.artifacts import ours
from nfm.pipeline.artifacts.artifact import Artifact, ArtifactError, artifacts_root
from nfm.pipeline.artifacts.lock import Lock
from nfm.pipeline.builder import build
from nfm.pipeline.config import RunConfig
from nfm.pipeline.graph import STAGES, Node
from nfm.pipeline.submit.slurm import SUBMISSIONS
from nfm.stages.base import StageError
from nfm.stages.pairs import stage as pairs
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.files.folder import below
from nfm.storage.files.paths import as_path, exists, is_remote, names_in, several

END_PRODUCTS = ("student", "evaluate", "report", "compare")
MAKING = "written to within the hour: it may be in the making, and goes an hour after its last file"
IDLE_SECONDS = 3600.0  # changed more recently: it may be in progress, as not every worker takes the lock


@dataclass
class Standing:
    """An artifact as gc sees it. `why` is the reason to keep it; empty if there is none."""

    path: Path
    stage: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)  # names of the artifacts that it was made from
    store: bool = False
    damage: str = ""
    told: bool = True  # whether any file says what it was made from
    locked: bool = False
    why: str = ""

    @property
    def name(self) -> str:
        return _name(self.path)


def survey(configs: Sequence[RunConfig], older_than: float) -> list[Standing]:
    """Every artifact under the root with the reason to keep it.

    An artifact is kept if it is damaged, locked by a live holder, an end product, made without the pipeline, reached by
    a config, listed by a submission, changed within `older_than` seconds, or if something that is kept was made from
    it. Without any config, pair stores are kept too, because readers elsewhere are unknown.
    """
    paths = _folders()
    found = {_name(path): held for path, held in zip(paths, several(artifacts_root(), _look, paths))}
    queued = _queued()
    reached = [reach for config in configs for reach in _reached(config)]
    for held in found.values():
        held.why = _own_reason(held, reached, queued)
    _spread(found)
    if unknown := next((held for held in found.values() if not held.told), None):
        for held in found.values():
            held.why = held.why or f"nobody can tell what the damaged {unknown.name} was made from; see to that first"
    now = time.time()
    for held in found.values():
        held.why = held.why or recently(held.path, older_than, now)
    _spread(found)
    return list(found.values())


def recently(path: Path, older_than: float, now: float) -> str:
    """Why an artifact is too young to be removed; empty if it is not."""
    changed, written, sealed = _times(path)
    if now - changed < older_than:
        return f"changed within {older_than / 86400:g} days"
    if written > sealed and now - written < IDLE_SECONDS:
        return MAKING
    return ""


def of_lock(name: str) -> bool:
    """Whether a file is a lock, the marker of a takeover, or a temporary file of either."""
    return name.startswith("lock.") or (atomic.is_temporary(name) and "-lock." in name)


def user_of(name: str) -> str:
    """An artifact that was made from the one of this name; empty if there is none now."""

    def look(path: Path) -> Standing:
        other = Standing(path)
        _describe(other, ["spec.json"])
        return other

    others = several(artifacts_root(), look, _folders())
    return next((other.name for other in others if name in other.inputs), "")


def _folders() -> list[Path]:
    """The folders of artifacts, complete or not. Hidden ones belong to the pipeline, others to the user."""
    root = artifacts_root()
    if is_remote(root):
        found = ours.folders(root)
    else:
        found = [path for path in sorted(root.resolve().glob("[!.]*/[!.]*")) if path.is_dir()]
    return [path for path, own in zip(found, several(root, _is_ours, found)) if own]


def _is_ours(path: Path) -> bool:
    """Whether a folder is ours, by its `spec.json`; without one (after a killed run or gc), by its name."""
    if exists(path / "spec.json"):
        return path.parent.name != SUBMISSIONS and not ours.is_foreign(path / "spec.json")
    if path.parent.name not in STAGES or ours.FINGERPRINT.fullmatch(path.name) is None:
        return False
    # A lock that was given back stays in a bucket; a folder with nothing else is no artifact's.
    return not is_remote(path) or not all(of_lock(name) for name in below(path)) or Lock(path).lives()


def _queued() -> dict[str, str]:
    """Stores that tasks of a submission may be about to complete: name -> submission. Such tasks hold no lock."""
    found = {}
    submissions = artifacts_root() / SUBMISSIONS
    for name in names_in(submissions):
        try:
            body = atomic.read_json(submissions / name / "worklist.json")
            found[_name(as_path(body["store"]))] = f"{SUBMISSIONS}/{name}"
        except (StorageError, KeyError, TypeError):
            continue  # damaged: its tasks refuse it too
    return found


def _name(path: Path) -> str:
    """`stage/fingerprint`, which identifies the content wherever links and moves have put the folder."""
    return f"{path.parent.name}/{path.name}"


def _look(path: Path) -> Standing:
    held = Standing(path, locked=Lock(path).lives())
    manifests = manifests_in(path)
    if not exists(path / "spec.json"):
        if any(not of_lock(name.rpartition("/")[2]) for name in below(path)):
            held.damage = "it has no spec.json"
        held.told = not manifests or _describe(held, manifests)
        return held
    held.told = _describe(held, ["spec.json", *manifests])
    try:
        for name in ["spec.json", *manifests]:
            Artifact(path, name).manifest()
    except (StorageError, ArtifactError) as error:
        held.damage = str(error).removeprefix(f"{path}/")
    return held


def manifests_in(path: Path) -> list[str]:
    """The names of the manifests of an artifact."""
    return [name for name in names_in(path) if name.startswith("manifest") and name.endswith(".json")]


def _describe(held: Standing, names: Sequence[str]) -> bool:
    """Fills in stage, config and inputs from the first readable file. Returns False if none is readable."""
    for name in names:
        try:
            body = atomic.read_json(held.path / name)
            references = body.get("inputs", {}).values()
            held.inputs = [_name(Path(reference["artifact"])) for reference in references]
        except (StorageError, KeyError, TypeError, AttributeError):
            continue
        held.stage, held.config = body.get("stage", "elsewhere"), body.get("config", {})
        held.store = "store" in body
        return True
    return False


def _own_reason(held: Standing, reached: Sequence[_Reach], queued: Mapping[str, str]) -> str:
    if held.damage:
        return f"damaged: {held.damage}; restore or repair it, or remove the folder yourself"
    if held.locked:
        return "somebody works on it"
    if held.stage in END_PRODUCTS:
        return f"an end product ({held.stage})"
    if not is_remote(held.path) and held.path.is_symlink():
        return "a link: its files lie elsewhere"
    if held.stage == "elsewhere":
        return "made without the pipeline"
    if any(reach.covers(held) for reach in reached):
        return "a config given with -c reaches it"
    if held.name in queued:
        return f"{queued[held.name]} is to complete it"
    if held.store and not reached and names_in(held.path / "commits"):
        return "a pair store with work in it; it goes only where -c names the configs in use and none reaches it"
    return ""


@dataclass(frozen=True)
class _Reach:
    """A folder that a config leads to. None if an input is missing or unreadable, because its content decides the
    place.

    Then every artifact of this stage and config counts that was made from the folders of the inputs, as far as known.
    """

    folder: str | None
    stage: str
    config: dict[str, Any]
    inputs: frozenset[str]

    def covers(self, held: Standing) -> bool:
        if self.stage == pairs.NAME == held.stage and self.inputs == set(held.inputs):
            return True  # pairs of the same data and teacher, made with other overrides of this config
        if self.folder is not None:
            return held.name == self.folder
        return held.stage == self.stage and held.config == self.config and self.inputs.issubset(held.inputs)


def _reached(config: RunConfig) -> Iterable[_Reach]:
    for node in build(config).values():
        inputs = frozenset(name for name in map(_folder, node.inputs.values()) if name is not None)
        inputs |= {_name(artifact.path) for artifact in node.given.values()}
        yield _Reach(_folder(node), node.stage.NAME, node.config.semantic(), inputs)


def _folder(node: Node) -> str | None:
    try:
        found = node.folder()
    except (StorageError, ArtifactError, StageError, OSError, KeyError):
        return None  # an input is damaged, or the files of the source are not here
    return _name(found) if found is not None else None


def _spread(found: dict[str, Standing]) -> None:
    """Artifacts that are kept also keep what they were made from."""
    waiting = [held for held in found.values() if held.why]
    while waiting:
        held = waiting.pop()
        for name in held.inputs:
            needed = found.get(name)
            if needed is not None and not needed.why:
                needed.why = f"{held.name} was made from it"
                waiting.append(needed)


def _times(path: Path) -> tuple[float, float, float]:
    """The times of the last change of any file, of the last change by work, and of the last change of a manifest."""
    sealed = changed = written = 0.0
    if not is_remote(path) and not (path / "spec.json").exists():
        changed = written = path.stat().st_mtime  # a run may be starting there
    for name, facts in below(path).items():
        top, _, rest = name.partition("/")
        if of_lock(name.rpartition("/")[2]):
            continue
        changed = max(changed, facts.changed)
        if name.startswith("manifest") and not rest:
            sealed = max(sealed, facts.changed)
        elif top not in ("events", "audits") or not rest:
            written = max(written, facts.changed)
    return changed, written, sealed
