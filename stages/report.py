"""The report stage: one self-contained HTML page about a whole run, from the data to the evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from nfm.stages import report_sections as sections
from nfm.stages.report_evaluation import Evaluation
from nfm.stages.report_page import page
from nfm.stages.stage import Inputs, Reporter, Result, Section, StageError, Stopped
from nfm.storage import PairStore
from nfm.storage.atomic import write_bytes

NAME = "report"
VERSION = 1
PAGE = "report.html"


class ReportConfig(Section):
    """[report]: what the page shows."""

    samples: int = Field(default=64, ge=1)
    seed: int = 0


def run(config: ReportConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Write `report.html` from the artifacts in `inputs`; "pairs:NAME" and "student:NAME" are baselines."""
    if "data" not in inputs:
        raise StageError(f"the report needs the data artifact among its inputs, it got {sorted(inputs)}")
    manifests = sections.read_manifests(inputs)
    stores = {role: PairStore.open(inputs[role]) for role in manifests if role.split(":")[0] == "pairs"}
    couplings = _coupling_names(stores)
    students = [role for role in manifests if role.split(":")[0] == "student"]
    trained = {couplings.get(role.replace("student", "pairs"), role): inputs[role] for role in students}
    evaluation = Evaluation(inputs["evaluate"], config.samples) if "evaluate" in inputs else None

    drawn = [("Stages", sections.stages(manifests))]
    drawn.append(("Data", sections.data(inputs["data"], manifests["data"], config.samples, config.seed)))
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


def _coupling_names(stores: Mapping[str, PairStore]) -> dict[str, str]:
    """What to call each store: its coupling, and its role too where two stores share one."""
    couplings = [store.spec.coupling for store in stores.values()]
    return {
        role: coupling if couplings.count(coupling) == 1 else f"{coupling} ({role})"
        for role, coupling in zip(stores, couplings)
    }
