"""`nfm plan`: what would run, stage by stage, and what it costs; of a comparison the sums of each kind of stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nfm.pipeline import prechecks
from nfm.pipeline.artifacts.artifact import Artifact
from nfm.pipeline.config import RunConfig
from nfm.pipeline.graph import STAGES, Node, optional, upstream
from nfm.pipeline.overview import Row, as_text, name_of, state_of
from nfm.pipeline.prechecks import Facts
from nfm.stages.base import Unfit
from nfm.stages.data import stage as data
from nfm.stages.data.latents import stage as latents
from nfm.stages.display import units
from nfm.stages.display.tables import aligned
from nfm.stages.pairs import progress as pairs_progress
from nfm.stages.pairs import stage as pairs
from nfm.stages.pairs.estimate import as_text as described
from nfm.stages.pairs.estimate import estimate
from nfm.stages.trained import features, student, teacher
from nfm.stages.trained.costs import Cost
from nfm.stages.trained.devices.timing import Clock
from nfm.stages.trained.student import StudentConfig
from nfm.stages.trained.training.section import TrainingSection

DONE, LATER = "nothing, is done", "run after its inputs"
WORKERS = (1, 8, 64)
TRAINED = (features.NAME, teacher.NAME, student.NAME)
RATED = {
    data.NAME: "images",
    latents.NAME: "images",
    features.NAME: "images",
    teacher.NAME: "images",
    pairs.NAME: "pairs",
    student.NAME: "pairs",
}


@dataclass(frozen=True)
class Asked:
    """The options of a plan: `data` stands for a data stage that is not looked at, `rate` is of one worker."""

    data: Mapping[str, Any] | None = None
    workers: Sequence[int] = ()
    rate: float | None = None
    memory: float | None = None  # GB of a device

    def check(self, target: str) -> None:
        """Raises Unfit for an option that would say nothing of this stage."""
        if self.rate is not None and target not in RATED:
            raise Unfit(f"--rate is of what {_listed(RATED)} do a second; {target} has no rate: leave it out")
        if self.workers and target != pairs.NAME:
            raise Unfit(f"--workers are of {pairs.NAME} and of what trains, not of {target}: leave it out")
        if self.memory is not None and target not in TRAINED:
            raise Unfit(f"--memory is of what trains, {_listed(TRAINED)}, not of {target}: leave it out")


def data_to_come(config: RunConfig, images: int, image_shape: Sequence[int], classes: int) -> Row:
    """What the data stage would tell of such data."""
    dtype = "uint8" if config.data.image_scale is None else "float16"
    return {"images": images, "image_shape": list(image_shape), "classes": classes, "image_dtype": dtype}


def plan(nodes: Mapping[str, Node], target: str, asked: Asked, say: Callable[[str], None]) -> list[Row]:
    """A row a stage that `target` needs: what would happen, and what it costs where that can be told yet.

    Where no rate is given this device is timed, after `say` said so. Raises Unfit for options that say nothing of the
    target, and for sizes that do not fit.
    """
    asked.check(target)
    if asked.data is None:
        prechecks.check(nodes, target)
        known = Facts(nodes) if nodes["data"].made() else Facts(nodes, {})
    else:
        known = Facts(nodes, asked.data)
        prechecks.check_fits(upstream(nodes, target), known)
    if not known.data and (asked.rate or asked.workers) and target != data.NAME:
        raise Unfit(f"--rate and --workers: nothing can be counted yet; {_REMEDY}")
    memory = {} if asked.memory is None else {"device_memory": asked.memory * 1e9}
    clock = Clock(say) if asked.rate is None else None
    there = [(node, node.artifact() if asked.data is None else None) for node in upstream(nodes, target)]
    if asked.data is not None and target != data.NAME:
        del there[0]  # inputs come first, and the first is the data, which the options stand for
    rows = []
    for node, artifact in there:
        cost, facts = Cost(), known.of(node)
        wanted = not _done(artifact) or (node.name == target and asked.rate)
        try:
            if wanted and node.name == data.NAME:
                cost = _cost(node, facts, clock)
            elif wanted and "image_shape" in facts:
                cost = _cost(node, _facts_of(node, nodes, facts | memory), clock)
            elif wanted and known.data:
                cost = Cost(unknown=_AFTER_LATENTS)
        except ModuleNotFoundError as error:  # of the base install; the rest of the plan is told all the same
            cost = Cost(unknown=f"told with {error.name}, which is not installed here")
        if node.name == target and asked.rate and cost.count:
            workers = node.config.workers if isinstance(node.config, TrainingSection) else 1
            cost = replace(cost, seconds=cost.count / (asked.rate * workers), unknown="", where="at --rate")
        would = _action(artifact) if artifact is not None or node.inputs else "run"
        rows.append(
            {"stage": node.name, "artifact": name_of(node, artifact), "would": would, "cost": str(cost)}
            | {"figures": cost.figures()}
        )
    facts = known.of(nodes[target])
    if target == pairs.NAME and "image_shape" in facts and (asked.workers or asked.rate or rows[-1]["would"] != DONE):
        rows[-1]["plan"] = _of_pairs(nodes[target], there[-1][1], _facts_of(nodes[target], nodes, facts), asked, clock)
    return rows


def plan_text(rows: Sequence[Row], target: str) -> str:
    """A plan for people: the stages' table, of a comparison one by kind; what making the pairs takes."""
    shown = [{key: row[key] for key in ("stage", "artifact", "would", "cost")} for row in rows]
    text = _by_kind(rows) if target == "compare" else as_text(shown)
    if "plan" in rows[-1]:
        return f"{text}\n\n{described(rows[-1]['plan'])}"
    untold = rows[0]["stage"] == "data" and rows[0]["would"] != DONE and len(rows) > 1
    return f"{text}\n\ncosts are not told before the data is there: {_REMEDY}" if untold else text


_AFTER_LATENTS = "told when the latents are there (their VAE is code of its user's own, which a plan does not run)"
_REMEDY = "run the data stage, or give --images N --image-shape CxHxW to plan without"


def _by_kind(rows: Sequence[Row]) -> str:
    """The sums of each kind of stage, and of all; what is in no sum stands below."""
    lines, notes = [], []
    for kind in (kind for kind in STAGES if any(_kind(row) == kind for row in rows)):
        of_kind = [row for row in rows if _kind(row) == kind]
        left = [row for row in of_kind if row["would"] != DONE]
        unit = RATED.get(kind, "")
        lines.append([kind, str(len(of_kind)), str(len(left)), *_sums(left, unit)])
        notes += [
            f"{kind}: {reason}"
            for reason in dict.fromkeys(row["figures"]["unknown"] for row in left if "unknown" in row["figures"])
        ]
    left = [row for row in rows if row["would"] != DONE]
    lines.append(["all", str(len(rows)), str(len(left)), *_sums(left, "")])
    table = aligned(["stage", "artifacts", "to make", "of", "FLOPs", "time here", "on disk"], lines)
    return "\n".join([table, *(["", "not in the sums:", *(f"  {note}" for note in notes)] if notes else [])])


def _sums(rows: Sequence[Row], unit: str) -> list[str]:
    def total(name: str) -> float:
        return sum(row["figures"].get(name, 0) for row in rows)

    seconds = units.about(total("seconds")) if total("seconds") else ""
    if seconds and any("unknown" in row["figures"] for row in rows):
        seconds = f"at least {seconds}"
    return [
        f"{total(unit):,} {unit}" if unit and total(unit) else "",
        f"{total('flops'):.2g}" if total("flops") else "",
        seconds,
        units.size(total("bytes")) if total("bytes") else "",
    ]


def _kind(row: Row) -> str:
    return str(row["stage"]).partition(":")[0]


def _cost(node: Node, facts: Row, clock: Clock | None) -> Cost:
    cost: Cost = optional(node.stage, "cost", lambda *_: Cost())(node.config, facts, clock)
    return cost


def _of_pairs(node: Node, artifact: Artifact | None, facts: Row, asked: Asked, clock: Clock | None) -> Row:
    """What making the pairs takes that are not committed yet."""
    config = node.config
    assert isinstance(config, pairs.PairsConfig)
    there = artifact is not None and artifact.started
    committed = pairs_progress.committed(artifact.path, config.draws)["pairs"] if artifact is not None and there else 0
    found = estimate(config, facts, asked.workers or WORKERS, asked.rate, committed, clock)
    if asked.workers and "hours" not in found:
        raise Unfit(f"--workers: {found['no_time']}; give --rate, the pairs a second of one worker")
    return found


def _facts_of(node: Node, nodes: Mapping[str, Node], facts: Row) -> Row:
    """The facts of the images with the sections that this node's cost depends on, and the roles of its inputs.

    Reflow's student is the one that generates: an artifact that was named, or of the run.
    """
    sections: Row = {name: each.config for name, each in nodes.items() if ":" not in name}
    if (given := node.given.get("student")) is not None:
        known = {key: value for key, value in given.spec["config"].items() if key in StudentConfig.model_fields}
        sections["student"] = StudentConfig.model_validate(known)
    return {**sections, **facts, "inputs": list(node.inputs)}


def _done(artifact: Artifact | None) -> bool:
    return artifact is not None and artifact.done


def _action(artifact: Artifact | None) -> str:
    if artifact is None:
        return LATER
    if (artifact.done or artifact.started) and state_of(artifact) == "damaged":
        return "stop: it is damaged, see nfm audit"
    return DONE if artifact.done else "resume" if artifact.started else "run"


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
