"""Builds the graph of a run from its config: every node with its inputs, also for `nfm compare`.

`student:nfm:soften=0.5@1` is the variant `nfm:soften=0.5` with `student.seed = 1`. Each node is an artifact of its own.
So a stopped comparison can continue, and a larger one makes only what is new.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from nfm.pipeline.artifacts.artifact import Artifact, WrongArtifact, check_store, find
from nfm.pipeline.config import ConfigError, RunConfig
from nfm.pipeline.graph import STAGES, Node, upstream
from nfm.stages.base import Section, StageError
from nfm.stages.couplings.facts import facts_of
from nfm.stages.couplings.variant import Variant
from nfm.stages.evaluation import compare
from nfm.stages.evaluation import stage as evaluate
from nfm.stages.evaluation.config import EvaluateConfig
from nfm.stages.pairs import stage as pairs
from nfm.stages.report import stage as report
from nfm.stages.trained import potential, student, teacher
from nfm.stages.trained.foreign import imported
from nfm.stages.trained.foreign.imported import ImportConfig
from nfm.stages.trained.teacher import TeacherConfig

# Options that do not affect a model get their defaults in its evaluation; otherwise it would be made again.
OF_TEACHERS = ("baselines", "guidance")
OF_STUDENTS = ("baselines", "nfe", "solver", "grid", "reference", "student_guidance", "guidance_interval",
    "ema", "diffusion", "curvature_trajectories")  # fmt: skip


class Builder:
    """A graph under construction. Every method adds a node with all its inputs, once, and returns its name."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.nodes: dict[str, Node] = {}
        knobs = config.student
        with _blaming("student"):
            self.main = Variant(config.pairs.coupling, knobs.soften, knobs.permuted, knobs.mixture)

    def add(self, name: str, section: Section, roles: Mapping[str, str], given: Mapping[str, Artifact] = {}) -> str:
        """Adds a node that reads the nodes in `roles`, by name, and the artifacts in `given`."""
        if name not in self.nodes:
            stage = STAGES[name.partition(":")[0]]
            inputs = {role: self.nodes[node] for role, node in roles.items()}
            self.nodes[name] = Node(name, stage, section, inputs, given)
        return name

    def images(self) -> str:
        """What trains and is paired: the data, or its latents if the config names a VAE."""
        if self.config.latents.vae is None:
            return "data"
        return self.add("latents", self.config.latents, {"data": "data"})

    def potential(self) -> str:
        return self.add("potential", self.config.potential, {"data": self.images()})

    def teacher(self) -> str:
        """The teacher that is trained, or the finished one that the config names."""
        section, artifact = teacher_of(self.config)
        self.nodes["teacher"] = Node("teacher", teacher, section, {"data": self.nodes[self.images()]}, {}, artifact)
        return "teacher"

    def pairs(self, coupling: str) -> str:
        """The store of a coupling; its name is `pairs` for the run's own coupling."""
        with _blaming("pairs"):
            section = pairs.for_coupling(self.config.pairs, coupling)
        roles: dict[str, str] = {}
        given: dict[str, Artifact] = {}
        for role in pairs.input_roles(section):
            if role == "potential":
                roles[role] = self.potential()
            elif role == "student" and section.student is not None:
                given[role] = _finished("pairs.student", section.student, student.NAME)
            elif role == "student":
                roles[role] = self._generator(section.reflow_of)
            else:
                roles[role] = self.images() if role == "data" else role
        name = "pairs" if coupling == self.config.pairs.coupling else f"pairs:{coupling}"
        return self.add(name, section, roles, given)

    def student(self, variant: Variant, seed: int | None = None) -> str:
        """The student of a variant; its name is `student` for the run's own. With a seed, the name includes it."""
        roles = {"pairs": self.pairs(variant.coupling)}
        given = self.first_weights()
        roles |= {f"pairs:{other}": self.pairs(other) for other in sorted(variant.mixture)}
        if seed is None and variant == self.main:
            return self.add("student", self.config.student, roles, given)
        knobs = {"soften": variant.soften, "permuted": variant.permuted, "mixture": dict(variant.mixture)}
        section = self.config.student.model_copy(update=knobs if seed is None else {**knobs, "seed": seed})
        return self.add(f"student:{variant}" if seed is None else f"student:{variant}@{seed}", section, roles, given)

    def first_weights(self) -> dict[str, Artifact]:
        """The finished student that students begin with, where the config names one."""
        if (named := self.config.student.init) is None:
            return {}
        artifact = _finished("student.init", named, student.NAME)
        student.fits_init(self.config.student, artifact.readable)
        return {"init": artifact}

    def measured_on(self) -> dict[str, str]:
        """What every evaluation reads: the data, its latents, this run's classifier if distances use its features."""
        own = self.config.evaluate.features == "cnn"
        return {name: name for name in dict.fromkeys(("data", self.images(), *(["features"] if own else [])))}

    def uses_teacher(self, targets: Iterable[str]) -> bool:
        """Whether the teacher made any store that these nodes depend on, directly or indirectly."""
        needed = (node for target in targets for node in upstream(self.nodes, target))
        return any(node.stage is pairs and "teacher" in node.inputs for node in needed)

    def _generator(self, coupling: str) -> str:
        with _blaming("pairs.reflow_of"):
            variant = Variant.parse(coupling)
            if any(facts_of(name).made_with == "student" for name in (variant.coupling, *variant.mixture)):
                raise ValueError(
                    "its student would need itself; name another coupling, or for a further round give "
                    "pairs.student, the artifact of a student of the round before"
                )
        return self.student(variant)


def build(config: RunConfig, store: Artifact | None = None, target: str = "") -> dict[str, Node]:
    """All nodes of a run by name. `store` replaces the pairs stage (to train only a student).

    `target` is a stage to add even if nothing else in the run needs it: `potential`, `compare`. Raises ConfigError if
    it needs an evaluation that this machine cannot do.
    """
    graph = Builder(config)
    if store is not None:
        check_store(store)
        if graph.main.mixture:
            raise ConfigError("student.mixture: a student alone reads one store; leave it out, or `nfm run student`")
        graph.add("student", config.student, {}, {"pairs": store, **graph.first_weights()})
        return graph.nodes
    if target in (evaluate.NAME, report.NAME, compare.NAME):
        _can_evaluate(config)
    graph.add("data", config.data, {})
    if "features" in graph.measured_on():
        graph.add("features", config.features, {"data": "data"})
    graph.teacher()
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
        _add_comparison(graph)
    return graph.nodes


def teacher_of(config: RunConfig) -> tuple[TeacherConfig, Artifact | None]:
    """A run's teacher: its section, and the finished artifact where the config names one, whose sizes it then has."""
    if config.teacher.artifact is None:
        return config.teacher, None
    artifact = _finished("teacher.artifact", config.teacher.artifact, teacher.NAME)
    return teacher.of_artifact(config.teacher, artifact.readable), artifact


def importing(config: RunConfig, section: ImportConfig) -> dict[str, Node]:
    """The graph of `nfm teacher import`: the data, and a teacher that is read from a file in place of being trained."""
    graph = Builder(config)
    graph.add("data", config.data, {})
    graph.nodes["teacher"] = Node("teacher", imported, section, {"data": graph.nodes[graph.images()]}, {})
    return graph.nodes


def _add_comparison(graph: Builder) -> str:
    """Adds `compare` with all its inputs to the graph of a run.

    Stores come first, because all must have the same order; stores that read a student come last among them. Then come
    the evaluations, all of the first seed before those of the next. So a comparison that is stopped early has its first
    seeds.
    """
    section = graph.config.compare
    if not section.couplings:
        raise ConfigError(
            "compare.couplings: none; name what is compared, for instance --couplings independent,nfm,nfm:soften=0.5"
        )
    pairs: dict[str, str] = {}
    students: dict[str, str] = {}
    evaluations: dict[str, str] = {}
    for variant, seed in section.students():
        student = graph.student(variant, seed)
        students[student] = student
        pairs |= {f"pairs:{name}": graph.pairs(name) for name in (variant.coupling, *variant.mixture)}
        measured = _without(graph.config.evaluate, OF_TEACHERS)
        roles = {**graph.measured_on(), "student": student}
        name = graph.add(f"evaluate:{variant}@{seed}", measured, roles)
        evaluations[name] = name
    if graph.uses_teacher(pairs.values()):
        measured = _without(graph.config.evaluate, OF_STUDENTS)
        name = graph.add("evaluate:teacher", measured, {**graph.measured_on(), "teacher": "teacher"})
        evaluations = {name: name, **evaluations}
    pairs = dict(sorted(pairs.items(), key=lambda item: "student" in graph.nodes[item[1]].inputs))
    return graph.add("compare", section, {**pairs, **evaluations, **students})


def _without(section: EvaluateConfig, names: tuple[str, ...]) -> EvaluateConfig:
    """The section with these options at their defaults."""
    return section.model_copy(update={name: EvaluateConfig.model_fields[name].default for name in names})


def _finished(field: str, reference: str, stage: str) -> Artifact:
    """The finished artifact of a stage that a field of the config names."""
    try:
        named = find(reference)
    except WrongArtifact as error:
        raise WrongArtifact(f"{field} = {reference}: {error}") from error
    if named.spec.get("stage") != stage or not named.done:
        raise WrongArtifact(f"{field} = {reference}: no finished {stage}; `nfm ls` lists what there is")
    return named


def _can_evaluate(config: RunConfig) -> None:
    try:
        evaluate.check(config.evaluate)
    except StageError as error:
        raise ConfigError(str(error)) from None


@contextmanager
def _blaming(field: str) -> Iterator[None]:
    """Turns an impossible variant into an error of the config field that asks for it."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from None
