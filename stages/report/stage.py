"""The report stage: one self-contained HTML page about a whole run, from the data to the evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from nfm.stages.base import Inputs, Reporter, Result, Section, StageError, Stopped
from nfm.stages.report import sections as sections
from nfm.stages.report.evaluation import Evaluation
from nfm.stages.report.html import page
from nfm.storage import ImageDataset, PairStore
from nfm.storage.files.atomic import write_bytes

NAME = "report"
VERSION = 1
PAGE = "report.html"


class ReportConfig(Section):
    """[report]: what the page shows."""

    samples: int = Field(default=64, ge=1)
    seed: int = 0


def run(config: ReportConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Writes `report.html` from the artifacts in `inputs`. "pairs:COUPLING" and "student:VARIANT" are baselines."""
    if "data" not in inputs:
        raise StageError(f"the report needs the data artifact among its inputs, it got {sorted(inputs)}")
    manifests = sections.read_manifests(inputs)
    stores = {role: PairStore.open(inputs[role]) for role in manifests if role.split(":")[0] == "pairs"}
    couplings = _distinct({role: store.spec.coupling for role, store in stores.items()})
    students = [role for role in manifests if role.split(":")[0] == "student"]
    variants = _distinct({role: _variant(role, manifests[role], couplings) for role in students})
    trained = {variants[role]: inputs[role] for role in students}
    evaluation = None
    if "evaluate" in inputs:
        classes = ImageDataset.open(inputs["data"], "train").classes
        evaluation = Evaluation(inputs["evaluate"], config.samples, classes)

    drawn = [("Stages", sections.stages(manifests))]
    drawn.append(("Data", sections.data(inputs["data"], manifests["data"], config.samples, config.seed)))
    if "latents" in inputs:
        shown = sections.data(inputs["latents"], manifests["latents"], config.samples, config.seed)
        drawn.append(("Latents", shown))
    if "teacher" in inputs:
        drawn.append(("Teacher", sections.teacher(inputs["teacher"], manifests["teacher"], evaluation)))
    if stores:
        named = {couplings[role]: store for role, store in stores.items()}
        drawn.append(("Pairs", sections.pairs(named, config.seed)))
    if trained:
        drawn.append(("Students", sections.students(trained, evaluation)))
    if evaluation:
        drawn.append(("Evaluation", evaluation.section()))
    if report.stopping:
        raise Stopped

    name = (manifests["data"].get("dataset") or {}).get("name", "images")
    html = page(f"Normalized Flow Matching on {name}", evaluation.lead() if evaluation else [], drawn)
    content = html.encode()
    write_bytes(out / PAGE, content)
    report.say(f"the report is {out / PAGE}")
    return Result(payload=[PAGE], metrics={"sections": len(drawn), "bytes": len(content)})


def _variant(role: str, manifest: Mapping[str, Any], couplings: Mapping[str, str]) -> str:
    """What a student was trained on. For a student older than variants, its store says so."""
    return str(manifest["metrics"].get("variant") or couplings.get(role.replace("student", "pairs"), role))


def _distinct(names: Mapping[str, str]) -> dict[str, str]:
    """The names by role. If two roles share a name, the role is added."""
    taken = list(names.values())
    return {role: name if taken.count(name) == 1 else f"{name} ({role})" for role, name in names.items()}
