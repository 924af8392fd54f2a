"""Lineage: from an artifact back to the data, by the references in its spec and manifest."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nfm.pipeline.artifacts.artifact import Artifact, artifacts_root
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.files.paths import as_path, is_url, names_in

_MANIFEST = re.compile(r"manifest(\.g\d{4,9})?\.json", re.ASCII)


@dataclass(frozen=True)
class Reference:
    """An input in a spec: `stage/fingerprint` under the root, or a whole path or URL; its manifest; its
    content digest.
    """

    artifact: str
    manifest: str
    content_digest: str


def references(artifact: Artifact) -> dict[str, Reference]:
    """The inputs that a spec names, by role.

    Raises StorageError for invalid names and for names that lead elsewhere.
    """
    stated, path = artifact.spec.get("inputs", {}), artifact.path / "spec.json"
    if not isinstance(stated, dict) or not all(isinstance(one, dict) for one in stated.values()):
        raise StorageError(f"{path}: its inputs are no references; restore it from a copy")
    return {role: _checked(f"{path}: input {role}", reference) for role, reference in stated.items()}


def _checked(where: str, stated: dict[str, Any]) -> Reference:
    values = [stated.get(key) for key in ("artifact", "manifest", "content_digest")]
    name, manifest, content = values
    if not (isinstance(name, str) and isinstance(manifest, str) and isinstance(content, str)):
        raise StorageError(
            f"{where}: artifact, manifest and content_digest are {values!r:.200}; restore it from a copy"
        )
    if ".." in name.split("/") or "\0" in name or not _MANIFEST.fullmatch(manifest):
        raise StorageError(f"{where}: {name!r:.200} with {manifest!r:.200} names no artifact; restore it from a copy")
    return Reference(name, manifest, content)


def inputs_of(artifact: Artifact) -> dict[str, Artifact]:
    """The artifacts that this one was made from, by role, under the same root. Raises StorageError."""
    return {role: _referred(reference) for role, reference in references(artifact).items()}


def _referred(reference: Reference) -> Artifact:
    """The artifact of a reference. A repaired store has the same content under a later manifest."""
    where = reference.artifact
    named = Artifact(as_path(where) if is_url(where) else artifacts_root() / where, reference.manifest)
    if not named.done:
        for name in names_in(named.path):
            if not (name.startswith("manifest") and name.endswith(".json")):
                continue
            with contextlib.suppress(StorageError):  # a damaged one is not the one that was read
                if atomic.read_json(named.path / name).get("content_digest") == reference.content_digest:
                    return Artifact(named.path, name)
    return named


def ancestors(artifact: Artifact) -> list[Artifact]:
    """The artifact and everything that it was made from, inputs first, each once."""
    seen: dict[str, Artifact] = {}

    def visit(found: Artifact) -> None:
        with contextlib.suppress(StorageError):  # the audit of that artifact reports a damaged spec
            for needed in inputs_of(found).values() if found.started else ():
                visit(needed)
        seen.setdefault(str(found.reference), found)

    visit(artifact)
    return list(seen.values())


def input_names(artifact: Artifact) -> list[str]:
    """The names of what an artifact was made from; none if its spec is damaged, since they are unknown then."""
    with contextlib.suppress(StorageError):
        return [reference.artifact for reference in references(artifact).values()]
    return []


def tree(artifact: Artifact, indent: str = "", role: str = "") -> Iterator[str]:
    """The lineage as indented lines: role, artifact, content, and when and by which code it was made."""
    lead = f"{indent}{role + ': ' if role else ''}{artifact.name}"
    if not artifact.done:
        yield f"{lead}  (not finished)" if artifact.started else f"{lead}  (missing)"
        return
    body = artifact.manifest()
    made, exported = "made without the pipeline", body.get("exported")
    if exported:
        source = f"content {exported['content_digest'][:12]} generation {exported['generation']}"
        made = f"exported from {source} ({exported['layout']}, {exported['codec']})"
    elif "finished" in body:
        code = (body["git_commit"] or "unknown code")[:12]
        made = f"made {body['finished']} in {body['seconds']:.0f} s by {code}"
    yield f"{lead}  content {body['content_digest'][:12]}  {artifact.manifest_name}  {made}"
    imported = body.get("imported")
    if imported:
        yield f"{indent}    imported from {imported['file']}, SHA-256 {imported['sha256']}"
    dataset = body.get("dataset")
    if dataset:
        yield f"{indent}    {dataset['name']}: {dataset['origin']}; licence {dataset['licence']}"
    for name, needed in inputs_of(artifact).items():
        yield from tree(needed, indent + "    ", name)


def as_json(artifact: Artifact) -> list[dict[str, Any]]:
    """The lineage for programs: one object for each artifact, inputs first."""
    return [
        {"artifact": found.name, "manifest": found.manifest_name, "inputs": found.spec.get("inputs", {}),
         "content_digest": found.manifest()["content_digest"] if found.done else None}
        for found in ancestors(artifact)
    ]  # fmt: skip
