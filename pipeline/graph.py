"""The stage graph: data -> {features, teacher} -> pairs -> student -> evaluate -> report.

A *node* is a stage in a run. A coupling that the evaluation compares with has its own pairs and student nodes,
`pairs:independent` and `student:independent`, which differ from the main ones in `pairs.coupling` alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nfm.pipeline.artifact import Artifact, ArtifactError, artifacts_root, fingerprint
from nfm.pipeline.config import RunConfig
from nfm.stages import data, evaluate, features, pairs, report, student, teacher
from nfm.stages.stage import Section

STAGES: dict[str, ModuleType] = {
    module.NAME: module for module in (data, features, teacher, pairs, student, evaluate, report)
}


@dataclass(frozen=True)
class Node:
    """One stage of one run with the nodes that it reads, by role."""

    name: str
    stage: ModuleType
    config: Section
    inputs: Mapping[str, Node]
    given: Mapping[str, Artifact]

    def artifact(self) -> Artifact | None:
        """Where this node's output lives; None while an input is missing, since its content decides the place."""
        folder = self.folder()
        if folder is None:
            return None
        return Artifact(folder, optional(self.stage, "manifest_name", lambda *_: "manifest.json")(self.config, folder))

    def folder(self) -> Path | None:
        """The folder of the artifact, which may hold several manifests."""
        inputs = self.input_artifacts()
        if inputs is None:
            return None
        return artifacts_root() / self.stage.NAME / self.fingerprint(inputs)[:12]

    def fingerprint(self, inputs: Mapping[str, Artifact]) -> str:
        """What decides this node's result, given its finished inputs, as SHA-256."""
        contents = {role: manifest_of(artifact)["content_digest"] for role, artifact in inputs.items()}
        identity = {**contents, **self.external()}
        return fingerprint(self.stage.NAME, self.stage.VERSION, self.config.semantic(), identity)

    def external(self) -> dict[str, str]:
        """Digests of what lies outside every artifact: the data stage's source files."""
        return {"source": _source(self.config)["digest"]} if self.stage is data else {}

    def input_artifacts(self) -> dict[str, Artifact] | None:
        """The finished artifacts that this node reads, by role; None when one is missing."""
        found = dict(self.given)
        for role, node in self.inputs.items():
            artifact = node.artifact()
            if artifact is None or not artifact.done:
                return None
            found[role] = artifact
        return found


def build(config: RunConfig, store: Artifact | None = None) -> dict[str, Node]:
    """All nodes of a run by name; `store` takes the place of the pairs stage (a student alone)."""
    nodes: dict[str, Node] = {}

    def add(name: str, section: Section, roles: Mapping[str, str], given: Mapping[str, Artifact] = {}) -> None:
        stage = STAGES[name.partition(":")[0]]
        nodes[name] = Node(name, stage, section, {role: nodes[node] for role, node in roles.items()}, given)

    if store is not None:
        if "store" not in store.spec:
            raise ArtifactError(f"{store.name} is no pair store; give the folder of one or a manifest in it")
        add("student", config.student, {}, {"pairs": store})
        return nodes
    add("data", config.data, {})
    add("features", config.features, {"data": "data"})
    add("teacher", config.teacher, {"data": "data"})
    baselines = [name for name in config.evaluate.baselines if name != config.pairs.coupling]
    evaluated = ["data", "features"]
    for suffix in ["", *(f":{name}" for name in baselines)]:
        section = config.pairs.model_copy(update={"coupling": suffix[1:]}) if suffix else config.pairs
        needed = pairs.input_roles(section)
        add(f"pairs{suffix}", section, {role: role for role in needed})
        add(f"student{suffix}", config.student, {"pairs": f"pairs{suffix}"})
        evaluated += [f"pairs{suffix}", f"student{suffix}"]
        if "teacher" in needed and "teacher" not in evaluated:
            evaluated.append("teacher")
    add("evaluate", config.evaluate, {role: role for role in evaluated})
    add("report", config.report, {role: role for role in [*evaluated, "evaluate"]})
    return nodes


def upstream(nodes: Mapping[str, Node], target: str) -> list[Node]:
    """The target and everything it needs, inputs first."""
    seen: dict[str, Node] = {}

    def visit(node: Node) -> None:
        for needed in node.inputs.values():
            visit(needed)
        seen.setdefault(node.name, node)

    visit(nodes[target])
    return list(seen.values())


def manifest_of(artifact: Artifact) -> dict[str, Any]:
    """The manifest, read once a process: committed files never change."""
    return _manifest(artifact.path.resolve(), artifact.manifest_name)


@functools.lru_cache(maxsize=256)
def _manifest(path: Path, name: str) -> dict[str, Any]:
    return Artifact(path, name).manifest()


@functools.lru_cache(maxsize=8)
def _source(config: Any) -> dict[str, Any]:
    return data.source_identity(config, artifacts_root() / ".sources")


def optional(stage: ModuleType, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
    """A stage's own answer where it gives one."""
    return getattr(stage, name, default)
