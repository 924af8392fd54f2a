"""The stage graph: data -> {features, [latents ->] teacher} -> pairs -> student -> evaluate -> report.

A *node* is a stage in a run. Another coupling than the run's own has its own pairs and student nodes,
`pairs:independent` and `student:independent`, which differ from the main ones only in the coupling. Semidiscrete OT
reads a `potential` of the data, reflow the student of another coupling. builder.py makes the nodes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nfm.pipeline.artifacts.artifact import Artifact, ArtifactError, WrongArtifact, artifacts_root, fingerprint
from nfm.pipeline.artifacts.lineage import references
from nfm.pipeline.config import ConfigError
from nfm.stages.base import Section
from nfm.stages.data import stage as data
from nfm.stages.data.latents import stage as latents
from nfm.stages.evaluation import compare
from nfm.stages.evaluation import stage as evaluate
from nfm.stages.pairs import stage as pairs
from nfm.stages.report import stage as report
from nfm.stages.trained import features, potential, student, teacher
from nfm.storage.errors import StorageError
from nfm.storage.files.paths import is_remote, scratch_root

STAGES: dict[str, ModuleType] = {
    module.NAME: module
    for module in (data, latents, features, teacher, potential, pairs, student, evaluate, report, compare)
}


@dataclass(frozen=True)
class Node:
    """One stage of one run with the nodes that it reads, by role; `finished` is an artifact that stands in for it."""

    name: str
    stage: ModuleType
    config: Section
    inputs: Mapping[str, Node]
    given: Mapping[str, Artifact]
    finished: Artifact | None = None

    def artifact(self) -> Artifact | None:
        """Where this node's output lives; None while an input is missing, since its content decides the place."""
        if self.finished is not None:
            self._check_origin(self.finished)
            return self.finished
        folder = self.folder()
        if folder is None:
            return None
        return Artifact(folder, optional(self.stage, "manifest_name", lambda *_: "manifest.json")(self.config, folder))

    def made(self) -> bool:
        """Whether the artifact exists and is finished."""
        artifact = self.artifact()
        return artifact is not None and artifact.done

    def _check_origin(self, artifact: Artifact) -> None:
        """Raises WrongArtifact where one that was named was made from other inputs than this run's, as far as known."""
        for role, reference in references(artifact).items():
            own = self.inputs[role].artifact() if role in self.inputs else None
            if own is not None and own.done and manifest_of(own)["content_digest"] != reference.content_digest:
                raise WrongArtifact(
                    f"{self.stage.NAME}.artifact = {artifact.name}: it was made with the {role} of "
                    f"{reference.artifact}, this run has {own.name}; name one that was made with this config"
                )

    def folder(self) -> Path | None:
        """The folder of the artifact, which may hold several manifests."""
        if self.finished is not None:
            return self.finished.path
        inputs = self.input_artifacts()
        if inputs is None:
            return None
        return artifacts_root() / self.stage.NAME / self.fingerprint(inputs)[:12]

    def readable_folder(self) -> Path | None:
        """The folder of the artifact; None also where an input is damaged, which is told of that input."""
        with contextlib.suppress(StorageError, ArtifactError):
            return self.folder()
        return None

    def fingerprint(self, inputs: Mapping[str, Artifact]) -> str:
        """The SHA-256 of what decides this node's result, given its finished inputs."""
        contents = {role: manifest_of(artifact)["content_digest"] for role, artifact in inputs.items()}
        identity = {**contents, **self.external()}
        return fingerprint(self.stage.NAME, self.stage.VERSION, self.config.semantic(), identity)

    def sees_pixels(self) -> bool:
        """Whether its images are those of the data, also where the run has latents."""
        return self.stage in (data, latents, features)

    def external(self) -> dict[str, str]:
        """Digests of what is outside all artifacts: the source files of the data, the code of a custom coupling."""
        if self.stage is data:
            return {"source": _source(self.config)["digest"]}
        return dict(optional(self.stage, "external", lambda _: {})(self.config))

    def input_artifacts(self) -> dict[str, Artifact] | None:
        """The finished artifacts that this node reads, by role; None if one is missing."""
        found = dict(self.given)
        for role, node in self.inputs.items():
            artifact = node.artifact()
            if artifact is None or not artifact.done:
                return None
            found[role] = artifact
        return found


def upstream(nodes: Mapping[str, Node], target: str) -> list[Node]:
    """The target and everything that it needs, inputs first."""
    if target not in nodes:
        raise ConfigError(f"this run has no stage {target}; it has {', '.join(nodes)}")
    seen: dict[str, Node] = {}

    def visit(node: Node) -> None:
        for needed in node.inputs.values():
            visit(needed)
        seen.setdefault(node.name, node)

    visit(nodes[target])
    return list(seen.values())


def manifest_of(artifact: Artifact) -> dict[str, Any]:
    """The manifest, read once in each process, because committed files never change."""
    return _manifest(artifact.path if is_remote(artifact.path) else artifact.path.resolve(), artifact.manifest_name)


@functools.lru_cache(maxsize=1024)
def _manifest(path: Path, name: str) -> dict[str, Any]:
    return Artifact(path, name).manifest()


@functools.lru_cache(maxsize=8)
def _source(config: Any) -> dict[str, Any]:
    root = artifacts_root()
    return data.source_identity(config, (scratch_root() if is_remote(root) else root) / ".sources")


def optional(stage: ModuleType, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the stage, or the default if the stage has none."""
    return getattr(stage, name, default)
