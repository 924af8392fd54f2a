"""The nodes of `nfm compare`: a store a coupling, a student and an evaluation a variant and seed, and their table.

`student:nfm:soften=0.5@1` is the variant `nfm:soften=0.5` with `student.seed = 1`. Each is an artifact of its own, so
a comparison that is stopped goes on, and one that grows makes only what is new.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nfm.pipeline.config import ConfigError
from nfm.stages.evaluation.stage import EvaluateConfig

if TYPE_CHECKING:
    from nfm.pipeline.graph import Builder

# Options that do not concern a model stand at their defaults in its evaluation, which they would make anew.
OF_TEACHERS = ("baselines", "guidance")
OF_STUDENTS = ("baselines", "nfe", "solver", "grid", "reference", "student_guidance", "curvature_trajectories")


def add(graph: Builder) -> str:
    """Add `compare` with all that it reads to a run's graph.

    Stores come first among its inputs, since all of them must be of one order, and of these the ones that read a
    student last; then the evaluations, all of the first seed before those of the next: a comparison that is stopped
    early has its first seeds.
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
