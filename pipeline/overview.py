"""What exists and what would run: `nfm plan`, `status`, `ls` and `pairs info`, as rows for users and programs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nfm.pipeline import prechecks
from nfm.pipeline.artifacts.artifact import Artifact, ArtifactError, artifacts_root, check_store, newest_manifest
from nfm.pipeline.artifacts.lineage import dependants
from nfm.pipeline.artifacts.ours import specs
from nfm.pipeline.config import RunConfig
from nfm.pipeline.console import progress
from nfm.pipeline.graph import Node, manifest_of, optional, upstream
from nfm.pipeline.runner import headline
from nfm.stages.display import units
from nfm.stages.display.tables import aligned
from nfm.stages.pairs import progress as pairs_progress
from nfm.stages.pairs.config import PairsConfig
from nfm.stages.pairs.estimate import as_text as described
from nfm.stages.pairs.estimate import estimate
from nfm.stages.stores import info
from nfm.stages.trained.teacher import TeacherConfig
from nfm.storage.errors import StorageError

Row = dict[str, Any]
DONE, LATER = "nothing, is done", "run after its inputs"
SHOWN = 3  # dependent artifacts shown by name


def plan(nodes: Mapping[str, Node], target: str) -> list[Row]:
    """One row for each stage that `target` needs: what would happen, and its cost if it is known yet."""
    prechecks.check(nodes, target)
    rows, facts = [], _facts(nodes)
    for node in upstream(nodes, target):
        artifact = node.artifact()
        row = {"stage": node.name, "artifact": _name(node, artifact), "would": _action(artifact)}
        done = artifact is not None and artifact.done
        estimate = optional(node.stage, "cost", lambda *_: {})
        try:
            cost = estimate(node.config, facts) if facts and not done else {}
        except ModuleNotFoundError as error:  # missing in the base install; the rest of the plan is shown
            cost = {"which is not installed here": f"told with {error.name},"}
        rows.append({**row, "cost": ", ".join(f"{value} {key}" for key, value in cost.items())})
    return rows


def pairs_plan(nodes: Mapping[str, Node], workers: Sequence[int], rate: float | None) -> Row | None:
    """The cost of the pairs, see `pairs_plan.estimate`; None until the data stage has counted them."""
    facts, pairs, teacher = _facts(nodes), nodes["pairs"].config, nodes["teacher"].config
    assert isinstance(pairs, PairsConfig)
    assert isinstance(teacher, TeacherConfig)
    artifact = nodes["pairs"].artifact()
    there = artifact is not None and artifact.started
    committed = pairs_progress.committed(artifact.path, pairs.draws)["pairs"] if artifact is not None and there else 0
    return estimate(pairs, teacher, facts, workers, rate, committed) if facts else None


def pairs_to_come(config: RunConfig, data: Row, workers: Sequence[int], rate: float | None) -> Row:
    """The row and plan of pairs without data yet. `data` has its images, image_shape and classes."""
    dtype = "uint8" if config.data.image_scale is None else "float16"
    facts = {"image_dtype": dtype, **data}
    row = {"stage": "pairs", "artifact": "pairs/(after its inputs)", "would": LATER, "cost": ""}
    return {**row, "plan": estimate(config.pairs, config.teacher, facts, workers, rate)}


def plan_text(rows: Sequence[Row]) -> str:
    """A plan as text: the table of stages, and the cost of the pairs."""
    text = as_text([{key: value for key, value in row.items() if key != "plan"} for row in rows])
    if "plan" not in rows[-1]:
        return text
    unknown = (
        "pairs cannot be counted before the data stage has run: run it, or give --images N --image-shape CxHxW "
        "to plan them without"
    )
    return f"{text}\n\n{described(rows[-1]['plan']) if rows[-1]['plan'] else unknown}"


def status(nodes: Mapping[str, Node], target: str | None = None) -> list[Row]:
    """One row for each stage: state, artifact, size on disk, and the first figures in its manifest.

    With `target`, rows of that stage and of those that it needs.
    """
    rows = []
    for node in upstream(nodes, target) if target else nodes.values():
        artifact = node.artifact()
        state = "waiting" if artifact is None else _state(artifact) if artifact.done or artifact.started else "-"
        rows.append(
            {
                "stage": node.name,
                "state": state,
                "artifact": _name(node, artifact),
                "size": units.size(_bytes(artifact.path)) if artifact is not None and artifact.started else "",
                "figures": _figures(artifact, getattr(node.config, "draws", None)),
            }
        )
    return rows


def inventory() -> list[Row]:
    """One row for each artifact under the root."""
    rows = []
    for spec in specs(artifacts_root()):
        artifact = Artifact(spec.parent, newest_manifest(spec.parent))
        rows.append(
            {
                "artifact": artifact.name,
                "state": _state(artifact),
                "size": units.size(_bytes(artifact.path)),
                "age": units.age(time.time() - spec.stat().st_mtime),
                "needed by": _few([other.name for other in dependants(artifact)]),
            }
        )
    return rows


def _state(artifact: Artifact) -> str:
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


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _facts(nodes: Mapping[str, Node]) -> Row:
    """What costs depend on: rows and shape, known after the data stage, and the sections by name."""
    data = nodes["data"].artifact() if "data" in nodes else None
    if data is None or not data.done:
        return {}
    configs = {name: node.config for name, node in nodes.items()}
    return {**configs, **manifest_of(data)["metrics"]}


def _name(node: Node, artifact: Artifact | None) -> str:
    return artifact.name if artifact is not None else f"{node.stage.NAME}/(after its inputs)"


def _action(artifact: Artifact | None) -> str:
    if artifact is None:
        return LATER
    if (artifact.done or artifact.started) and _state(artifact) == "damaged":
        return "stop: it is damaged, see nfm audit"
    return DONE if artifact.done else "resume" if artifact.started else "run"


def _figures(artifact: Artifact | None, draws: int | None) -> str:
    if artifact is None or not artifact.started:
        return ""
    return headline(artifact) if artifact.done else progress.figures(artifact, draws)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more or "-"
