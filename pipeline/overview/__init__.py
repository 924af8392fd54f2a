"""What exists: `nfm status`, `ls` and `pairs info`, as rows for users and programs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nfm.pipeline.artifacts.artifact import Artifact, ArtifactError, artifacts_root, check_store, newest_manifest
from nfm.pipeline.artifacts.lineage import input_names
from nfm.pipeline.artifacts.listing import listed
from nfm.pipeline.artifacts.ours import specs
from nfm.pipeline.console import progress
from nfm.pipeline.graph import Node, upstream
from nfm.pipeline.runner import headline
from nfm.stages.display import units
from nfm.stages.display.tables import aligned
from nfm.stages.stores import info
from nfm.storage.errors import StorageError
from nfm.storage.files.paths import is_remote, size_below

Row = dict[str, Any]
SHOWN = 3  # dependent artifacts shown by name


def status(nodes: Mapping[str, Node], target: str | None = None) -> list[Row]:
    """One row for each stage: state, artifact, size on disk, and the first figures in its manifest.

    With `target`, rows of that stage and of those that it needs.
    """
    rows = []
    for node in upstream(nodes, target) if target else nodes.values():
        artifact, state = _standing(node)
        rows.append(
            {
                "stage": node.name,
                "state": state,
                "artifact": name_of(node, artifact),
                "size": units.size(size_below(artifact.path)) if artifact is not None and artifact.started else "",
                "figures": "" if state == "damaged" else _figures(artifact, getattr(node.config, "draws", None)),
            }
        )
    return rows


def _standing(node: Node) -> tuple[Artifact | None, str]:
    """The artifact of a node and its state. There is none where an input is not there, or is damaged."""
    with contextlib.suppress(StorageError, ArtifactError):
        artifact = node.artifact()
        if artifact is None:
            return None, "waiting"
        return artifact, state_of(artifact) if artifact.done or artifact.started else "-"
    folder = node.readable_folder()
    return (None, "waiting") if folder is None else (Artifact(folder, newest_manifest(folder)), "damaged")


def inventory() -> list[Row]:
    """One row for each artifact under the root. One from which others were made was finished, whatever it is now."""
    root = artifacts_root()
    found = _in_bucket(root) if is_remote(root) else [_here(spec.parent) for spec in specs(root)]
    users: dict[str, list[str]] = {}
    for row in found:
        for name in row.pop("inputs"):
            users.setdefault(name, []).append(row["artifact"])
    for row in found:
        row["needed by"] = _few(needed := users.get(row["artifact"], []))
        if needed and row["state"] == "started":  # it lost its manifest
            row["state"] = "damaged"
    return found


def _here(folder: Path) -> Row:
    artifact = Artifact(folder, newest_manifest(folder))
    spec = folder / "spec.json"
    size, changed = size_below(folder), (spec if spec.exists() else folder).stat().st_mtime
    return _row(artifact.name, state_of(artifact), size, changed, input_names(artifact))


def _in_bucket(root: Path) -> list[Row]:
    rows = []
    for one in listed(root):
        state = "damaged" if one.damaged else "done" if one.finished else "started"
        rows.append(_row(Artifact(one.path).name, state, one.bytes, one.changed, one.inputs))
    return rows


def _row(name: str, state: str, size: int, changed: float, inputs: list[str]) -> Row:
    age = units.age(time.time() - changed)
    return {"artifact": name, "state": state, "size": units.size(size), "age": age, "inputs": inputs}


def state_of(artifact: Artifact) -> str:
    try:
        if artifact.done:
            artifact.manifest()
        return "done" if artifact.spec and artifact.done else "started"
    except (StorageError, ArtifactError):
        return "damaged"


def store_info(artifact: Artifact) -> Row:
    """The recipe of a store and the figures of its pinned generation."""
    check_store(artifact)
    artifact.manifest()  # raises for an unfinished or damaged artifact
    return {"store": artifact.name, **info.info(artifact.reference)}


def as_text(rows: Sequence[Row]) -> str:
    """Rows as aligned columns under their names."""
    return aligned(list(rows[0]), [list(row.values()) for row in rows])


def name_of(node: Node, artifact: Artifact | None) -> str:
    later = "after its inputs" if node.inputs else "of such images"
    return artifact.name if artifact is not None else f"{node.stage.NAME}/({later})"


def _figures(artifact: Artifact | None, draws: int | None) -> str:
    if artifact is None or not artifact.started:
        return ""
    return headline(artifact) if artifact.done else progress.figures(artifact, draws)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more or "-"
