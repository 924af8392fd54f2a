"""Artifacts: one folder for each fingerprint.

`spec.json` is written first, the manifest last; committed files never change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nfm.pipeline.artifacts.ours import folders, is_foreign, of_ours
from nfm.stages.base import Result
from nfm.storage.errors import StorageError, Told, WrongUse
from nfm.storage.files import atomic
from nfm.storage.files.copies import mirror
from nfm.storage.files.copies.resume import Resume
from nfm.storage.files.parallel import parallel
from nfm.storage.files.paths import artifacts_root, as_path, exists, is_remote, size_of
from nfm.storage.ledger import manifests, standing

SCHEMA = 1
STORES = "pairs"  # the stage whose artifacts are pair stores
__all__ = [
    "SCHEMA", "Artifact", "ArtifactError", "WrongArtifact", "artifacts_root", "check_store", "find", "fingerprint",
    "is_store", "newest_manifest", "open_spec", "publish", "readable", "under_root", "workplace",
]  # fmt: skip


class ArtifactError(Told):
    """An artifact is missing, unreadable or in the way. The message says which one and what to do."""


class WrongArtifact(ArtifactError, WrongUse):  # noqa: N818 - it reads as what it says
    """What was named is not an artifact, or is one of the wrong kind for the command."""


def fingerprint(stage: str, version: int, config: dict[str, Any], inputs: dict[str, str]) -> str:
    """SHA-256 of the canonical JSON of what decides a result: stage, its version, semantic config, content of the
    inputs.
    """
    body = {"stage": stage, "version": version, "config": config, "inputs": inputs}
    return atomic.digest(atomic.canonical_json(body))


@dataclass(frozen=True)
class Artifact:
    """A folder `<root>/<stage>/<fingerprint, 12 hex>` and the one of its manifests that is meant.

    In a bucket, `path` is a path of `as_path`. So it is of a store from somebody else, which may be anywhere.
    """

    path: Path
    manifest_name: str = "manifest.json"

    @property
    def spec(self) -> dict[str, Any]:
        return atomic.read_json(self.path / "spec.json")

    @property
    def started(self) -> bool:
        return exists(self.path / "spec.json")

    @property
    def done(self) -> bool:
        return exists(self.path / self.manifest_name)

    @property
    def of_store(self) -> bool:
        """Whether its spec is that of a pair store, wherever it was made."""
        with contextlib.suppress(StorageError):
            return "store" in self.spec
        return False

    @property
    def name(self) -> str:
        """`stage/fingerprint` under the root; elsewhere the whole path or the URL."""
        path = self.path if is_remote(self.path) else self.path.resolve()
        return _short_name(path) if under_root(path) else str(path)

    @property
    def reference(self) -> Path:
        """The folder, or the manifest if it is one generation of several."""
        return self.path if self.manifest_name == "manifest.json" else self.path / self.manifest_name

    @property
    def readable(self) -> Path:
        """What a stage reads: the reference of a store, which may be in a bucket; else a folder of this machine.

        The files of an artifact in a bucket are brought here. Raises StorageError.
        """
        return self.reference if is_store(self.path) else mirror.pull(self.path)

    def manifest(self) -> dict[str, Any]:
        try:
            body = atomic.read_json(self.path / self.manifest_name)
        except StorageError as error:
            if self.done or not self.started:
                raise
            if self.of_store:
                raise ArtifactError(f"{self.name}: {standing.UNSEALED}; {standing.unsealed(self.path)}") from error
            raise ArtifactError(f"{self.name}: is not finished; the command that makes it goes on with it") from error
        if body.get("schema", 0) > SCHEMA:
            raise ArtifactError(
                f"{self.path / self.manifest_name}: schema {body['schema']} is newer than this version of nfm "
                f"reads ({SCHEMA}); upgrade nfm-pairs, the artifact is left as it is"
            )
        return body


def readable(inputs: Mapping[str, Artifact]) -> dict[str, Path]:
    """Where a stage reads its inputs, by role. Those in a bucket are brought here, except stores."""
    return {role: found.readable for role, found in inputs.items()}


def under_root(path: Path) -> bool:
    """Whether this is the place of an artifact of the root, and not one of somebody else."""
    root = artifacts_root()
    if is_remote(path) or is_remote(root):
        return str(path.parent.parent).rstrip("/") == str(root)
    return path.absolute().parent.parent in (root.absolute(), root.resolve())


def is_store(path: Path) -> bool:
    """Whether shards are read and written at this place itself, however many stages work on them."""
    return path.parent.name == STORES or not under_root(path)


def workplace(path: Path) -> Path:
    """Where a stage writes that makes this artifact: there, or in a folder of this machine if that is in a bucket."""
    return path if is_store(path) else mirror.local_folder(path)


def find(reference: str | Path) -> Artifact:
    """The artifact that a user names: a folder or URL, a manifest, `stage/fingerprint`, or the unique
    beginning of one.
    """
    root, given = artifacts_root(), as_path(reference)
    text, remote = str(given), is_remote(given)
    elsewhere = remote or (is_remote(root) and given.is_absolute())
    for path in (given,) if elsewhere else (given, root / text):
        if path.name.startswith("manifest") and size_of(path) is not None:
            return Artifact(path.parent, path.name)
        if exists(path / "spec.json"):
            if is_foreign(path / "spec.json"):
                raise WrongArtifact(f"{path}: no artifact, its spec.json is none of ours; `nfm ls` lists what there is")
            return Artifact(path, newest_manifest(path))
        if standing.begun(path):
            raise WrongArtifact(f"{path}: a pair store that was begun and is not complete; {standing.again(path)}")
    if remote:
        raise WrongArtifact(f"{text}: no store there, it has no spec.json; check the URL")
    begun = [path for path in folders(root) if _short_name(path, "/" in text).startswith(text)]
    found = [spec.parent for spec in of_ours(begun)]
    if len(found) == 1:
        return Artifact(found[0], newest_manifest(found[0]))
    if found:
        several = ", ".join(_short_name(path) for path in found)
        raise WrongArtifact(f"{text} names several artifacts: {several}; write more of the fingerprint")
    if Path(text).exists():
        kind = "a folder without a spec.json of ours" if Path(text).is_dir() else "a file, and an artifact is a folder"
        raise WrongArtifact(f"{text}: {kind}, so no artifact; `nfm ls` lists what there is")
    raise WrongArtifact(f"no artifact {text} under {root}; `nfm ls` lists what there is")


def _short_name(path: Path, with_stage: bool = True) -> str:
    return f"{path.parent.name}/{path.name}" if with_stage else path.name


def check_store(artifact: Artifact, remedy: str = "give the folder of one or a manifest in it, see `nfm ls`") -> None:
    """Raises WrongArtifact for anything but a pair store. Damage is reported by its reader."""
    with contextlib.suppress(StorageError):
        if "store" not in artifact.spec:
            raise WrongArtifact(f"{artifact.name} is no pair store; {remedy}")


def newest_manifest(path: Path) -> str:
    """The name of the newest manifest in a folder. A store has one for each generation."""
    number = manifests.newest_number(path)
    return manifests.manifest_path(path, number).name if number else "manifest.json"


def open_spec(path: Path, body: dict[str, Any]) -> dict[str, Any]:
    """Creates `spec.json`, or checks that the existing one is of the same work. Returns the valid one."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)
    if atomic.create_json(path / "spec.json", body):
        return body
    found = atomic.read_json(path / "spec.json")
    if found["fingerprint"] != body["fingerprint"]:
        raise ArtifactError(f"{path / 'spec.json'} holds another fingerprint; move that folder away")
    return found


def publish(
    path: Path, result: Result, provenance: dict[str, Any], check: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Writes the manifest, after hashing files that are not hashed yet and bringing all to a bucket.

    It is the last file, and created only if absent. `check` raises if the artifact is somebody else's by now.
    """
    folder = workplace(path)
    names = [*result.payload, *result.files]
    unknown = [name for name in names if name not in result.digests]
    hashed = dict(zip(unknown, parallel(lambda name: atomic.hash_file(folder / name), unknown)))
    digests = {**hashed, **result.digests}
    if folder != path:
        mirror.push(path, folder, {name: digests[name] for name in names}, check)
        check()
    content = result.content_digest or atomic.content_digest(digests[name][0] for name in result.payload)
    body = {
        "schema": SCHEMA,
        **provenance,
        "content_digest": content,
        "files": [
            {
                "path": name,
                "bytes": digests[name][1],
                "sha256": digests[name][0],
                "payload": name in result.payload,
            }
            for name in names
        ],
        "metrics": result.metrics,
        **result.extra,
    }
    if not atomic.create_json(path / result.manifest, body):
        raise ArtifactError(f"{path / result.manifest} exists already; another process finished this artifact")
    if folder != path:
        mirror.committed(path, folder, body)
        Resume(folder, check).clear()
    return body
