"""The stage graph: data -> {features, teacher} -> pairs -> student -> evaluate -> report.

A *node* is a stage in a run. A coupling beside the run's own has pairs and student nodes of its own,
`pairs:independent` and `student:independent`, which differ from the main ones in the coupling alone. Semidiscrete OT
reads a `potential` of the data, reflow the student of another coupling. The nodes of `compare` are in comparing.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nfm.pipeline import comparing
from nfm.pipeline.artifacts.artifact import Artifact, WrongArtifact, artifacts_root, check_store, find, fingerprint
from nfm.pipeline.config import ConfigError, RunConfig
from nfm.stages.base import Section, StageError
from nfm.stages.couplings.variant import Variant
from nfm.stages.data import stage as data
from nfm.stages.evaluation import compare
from nfm.stages.evaluation import stage as evaluate
from nfm.stages.pairs import stage as pairs
from nfm.stages.report import stage as report
from nfm.stages.trained import features, potential, student, teacher

STAGES: dict[str, ModuleType] = {
    module.NAME: module for module in (data, features, teacher, potential, pairs, student, evaluate, report, compare)
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

    def made(self) -> bool:
        """Whether the artifact is there and finished."""
        artifact = self.artifact()
        return artifact is not None and artifact.done

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
        """Digests of what lies outside every artifact: the data's source files, a custom coupling's code."""
        if self.stage is data:
            return {"source": _source(self.config)["digest"]}
        return dict(optional(self.stage, "external", lambda _: {})(self.config))

    def input_artifacts(self) -> dict[str, Artifact] | None:
        """The finished artifacts that this node reads, by role; None when one is missing."""
        found = dict(self.given)
        for role, node in self.inputs.items():
            artifact = node.artifact()
            if artifact is None or not artifact.done:
                return None
            found[role] = artifact
        return found


class Builder:
    """The graph of a run in the making: every method adds a node with all that it reads, once, and names it."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.nodes: dict[str, Node] = {}
        knobs = config.student
        with _blaming("student"):
            self.main = Variant(config.pairs.coupling, knobs.soften, knobs.permuted, knobs.mixture)

    def add(self, name: str, section: Section, roles: Mapping[str, str], given: Mapping[str, Artifact] = {}) -> str:
        """A node that reads the nodes of `roles`, by their names, and the artifacts of `given`."""
        if name not in self.nodes:
            stage = STAGES[name.partition(":")[0]]
            inputs = {role: self.nodes[node] for role, node in roles.items()}
            self.nodes[name] = Node(name, stage, section, inputs, given)
        return name

    def potential(self) -> str:
        return self.add("potential", self.config.potential, {"data": "data"})

    def pairs(self, coupling: str) -> str:
        """The store of a coupling: `pairs` for the run's own."""
        with _blaming("pairs"):
            section = pairs.for_coupling(self.config.pairs, coupling)
        roles: dict[str, str] = {}
        given: dict[str, Artifact] = {}
        for role in pairs.input_roles(section):
            if role == "potential":
                roles[role] = self.potential()
            elif role == "student" and section.student is not None:
                given[role] = _trained(section.student)
            elif role == "student":
                roles[role] = self._generator(section.reflow_of)
            else:
                roles[role] = role
        name = "pairs" if coupling == self.config.pairs.coupling else f"pairs:{coupling}"
        return self.add(name, section, roles, given)

    def student(self, variant: Variant, seed: int | None = None) -> str:
        """The student of a variant: `student` for the run's own; with a seed, a name that tells it."""
        roles = {"pairs": self.pairs(variant.coupling)}
        roles |= {f"pairs:{other}": self.pairs(other) for other in sorted(variant.mixture)}
        if seed is None and variant == self.main:
            return self.add("student", self.config.student, roles)
        knobs = {"soften": variant.soften, "permuted": variant.permuted, "mixture": dict(variant.mixture)}
        section = self.config.student.model_copy(update=knobs if seed is None else {**knobs, "seed": seed})
        return self.add(f"student:{variant}" if seed is None else f"student:{variant}@{seed}", section, roles)

    def measured_on(self) -> dict[str, str]:
        """What every evaluation reads of the data: this run's classifier where distances are taken in its features."""
        own = self.config.evaluate.features == "cnn"
        return {"data": "data", "features": "features"} if own else {"data": "data"}

    def uses_teacher(self, targets: Iterable[str]) -> bool:
        """Whether any store that these nodes come from, however far back, is made by the teacher."""
        needed = (node for target in targets for node in upstream(self.nodes, target))
        return any(node.stage is pairs and "teacher" in node.inputs for node in needed)

    def _generator(self, coupling: str) -> str:
        with _blaming("pairs.reflow_of"):
            variant = Variant.parse(coupling)
            if "reflow" in (variant.coupling, *variant.mixture):
                raise ValueError(
                    "its student would need itself; name another coupling, or for a further round give "
                    "pairs.student, the artifact of a student of the round before"
                )
        return self.student(variant)


def build(config: RunConfig, store: Artifact | None = None, target: str = "") -> dict[str, Node]:
    """All nodes of a run by name; `store` takes the place of the pairs stage (a student alone).

    `target` is a stage that is wanted even where nothing else in the run needs it: `potential`, `compare`. Raises
    ConfigError where it needs an evaluation that this machine cannot make.
    """
    graph = Builder(config)
    if store is not None:
        check_store(store)
        if graph.main.mixture:
            raise ConfigError("student.mixture: a student alone reads one store; leave it out, or `nfm run student`")
        graph.add("student", config.student, {}, {"pairs": store})
        return graph.nodes
    if target in (evaluate.NAME, report.NAME, compare.NAME):
        _can_evaluate(config)
    graph.add("data", config.data, {})
    if "features" in graph.measured_on():
        graph.add("features", config.features, {"data": "data"})
    graph.add("teacher", config.teacher, {"data": "data"})
    variants = [Variant.parse(text) for text in config.evaluate.baselines]
    trained = list(dict.fromkeys(graph.student(variant) for variant in [graph.main, *variants]))
    evaluated = {**graph.measured_on(), **{name: name for name in trained}}
    if graph.uses_teacher(trained):
        evaluated["teacher"] = "teacher"
    graph.add("evaluate", config.evaluate, evaluated)
    stores = {node.name for name in trained for node in graph.nodes[name].inputs.values()}
    graph.add("report", config.report, {name: name for name in [*evaluated, *sorted(stores), "evaluate"]})
    if target == potential.NAME:
        graph.potential()
    if target == compare.NAME or config.compare.couplings:
        comparing.add(graph)
    return graph.nodes


def upstream(nodes: Mapping[str, Node], target: str) -> list[Node]:
    """The target and everything it needs, inputs first."""
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
    """The manifest, read once a process: committed files never change."""
    return _manifest(artifact.path.resolve(), artifact.manifest_name)


@functools.lru_cache(maxsize=1024)
def _manifest(path: Path, name: str) -> dict[str, Any]:
    return Artifact(path, name).manifest()


@functools.lru_cache(maxsize=8)
def _source(config: Any) -> dict[str, Any]:
    return data.source_identity(config, artifacts_root() / ".sources")


def optional(stage: ModuleType, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
    """A stage's own answer where it gives one."""
    return getattr(stage, name, default)


def _trained(reference: str) -> Artifact:
    found = find(reference)
    if found.spec.get("stage") != student.NAME or not found.done:
        raise WrongArtifact(f"pairs.student = {reference}: no finished student; `nfm ls` lists what there is")
    return found


def _can_evaluate(config: RunConfig) -> None:
    try:
        evaluate.check(config.evaluate)
    except StageError as error:
        raise ConfigError(str(error)) from None


@contextmanager
def _blaming(field: str) -> Iterator[None]:
    """A variant that cannot be, told as an error of the config's field that asks for it."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from None
