"""Lineage: from an artifact back to the data, by the references that its spec and manifest hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from nfm.pipeline.artifact import Artifact, artifacts_root
from nfm.storage import atomic
from nfm.storage.errors import StorageError
from nfm.storage.paths import as_path, is_url, names_in


def inputs_of(artifact: Artifact) -> dict[str, Artifact]:
    """The artifacts that this one was made from, by role, under the same root."""
    return {role: _referred(reference) for role, reference in artifact.spec.get("inputs", {}).items()}


def _referred(reference: Mapping[str, str]) -> Artifact:
    """The artifact of a reference; a store that was repaired has the same content under a later manifest."""
    where = reference["artifact"]
    named = Artifact(as_path(where) if is_url(where) else artifacts_root() / where, reference["manifest"])
    if not named.done:
        for name in names_in(named.path):
            if not (name.startswith("manifest") and name.endswith(".json")):
                continue
            if atomic.read_json(named.path / name).get("content_digest") == reference["content_digest"]:
                return Artifact(named.path, name)
    return named


def ancestors(artifact: Artifact) -> list[Artifact]:
    """The artifact and everything it was made from, inputs first, each once."""
    seen: dict[str, Artifact] = {}

    def visit(found: Artifact) -> None:
        with contextlib.suppress(StorageError):  # a damaged spec: the audit of that artifact says so
            for needed in inputs_of(found).values() if found.started else ():
                visit(needed)
        seen.setdefault(str(found.reference), found)

    visit(artifact)
    return list(seen.values())


def dependants(artifact: Artifact) -> Iterator[Artifact]:
    """The artifacts under the root that were made from this one."""
    for path in sorted(artifacts_root().glob("*/*/spec.json")):
        other = Artifact(path.parent)
        with contextlib.suppress(StorageError):  # a damaged spec: nobody can say what it was made from
            if any(reference["artifact"] == artifact.name for reference in other.spec.get("inputs", {}).values()):
                yield other


def tree(artifact: Artifact, indent: str = "", role: str = "") -> Iterator[str]:
    """The lineage as indented lines: role, artifact, content, when and by which code it was made."""
    lead = f"{indent}{role + ': ' if role else ''}{artifact.name}"
    if not artifact.done:
        yield f"{lead}  (not finished)" if artifact.started else f"{lead}  (missing)"
        return
    body = artifact.manifest()
    made = "made without the pipeline"
    if "finished" in body:
        code = (body["git_commit"] or "unknown code")[:12]
        made = f"made {body['finished']} in {body['seconds']:.0f} s by {code}"
    yield f"{lead}  content {body['content_digest'][:12]}  {artifact.manifest_name}  {made}"
    exported = body.get("exported")
    if exported:
        source = f"content {exported['content_digest'][:12]} generation {exported['generation']}"
        yield f"{indent}    exported from {source} ({exported['layout']}, {exported['codec']})"
    dataset = body.get("dataset")
    if dataset:
        yield f"{indent}    {dataset['name']}: {dataset['origin']}; licence {dataset['licence']}"
    for name, needed in inputs_of(artifact).items():
        yield from tree(needed, indent + "    ", name)


def as_json(artifact: Artifact) -> list[dict[str, Any]]:
    """The same for machines: one object an artifact, inputs first."""
    return [
        {"artifact": found.name, "manifest": found.manifest_name, "inputs": found.spec.get("inputs", {}),
         "content_digest": found.manifest()["content_digest"] if found.done else None}
        for found in ancestors(artifact)
    ]  # fmt: skip
