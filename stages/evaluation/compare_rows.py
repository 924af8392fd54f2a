"""A comparison as JSON: means and spreads of the measurements over seeds, losses, and facts of the stores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nfm.stages.couplings.variant import Variant
from nfm.stages.display.watching.lines import METRICS, read_lines
from nfm.stages.evaluation.config import SPEEDS
from nfm.stages.evaluation.table import distance_key
from nfm.stages.trained.sampling import REFERENCE
from nfm.storage.files import atomic

Row = dict[str, Any]
Evaluations = Mapping[str, Mapping[str, Any]]  # by `VARIANT@SEED` and `teacher`: bodies of evaluation.json

SETS = ("w2_points", "w2_sets")  # the number and the size of the sets for an exact W2
# Columns that identify the measurement of a row. Every other number in it is a metric or a speed.
IDENTITY = (
    "name",
    "model",
    "coupling",
    "sampler",
    "nfe",
    "guidance",
    "samples",
    "parameters",
    "kid_size",
    "spread",
    "floor_draws",
    *SETS,
)
RATES = tuple(name for name in SPEEDS if name != "batch")
# copied from the coupling report of a store
REPORTED = ("auc", "auc_error", "transport_cost", "nll_train", "nll_heldout")


def body(
    students: Iterable[tuple[Variant, int]], evaluations: Evaluations, folders: Mapping[str, Path],
    stores: Mapping[str, Mapping[str, Any]],
) -> Row:  # fmt: skip
    """`compare.json`: the rows of students by variant and sampler, of the teacher and the floor; curvature
    and losses.
    """
    seeds: dict[str, list[int]] = {}
    for variant, seed in students:
        seeds.setdefault(str(variant), []).append(seed)
    everyone = {name: _by_name(evaluations[name]) for name in evaluations}
    first = next(iter(everyone.values()))
    rows = [row for name in seeds for row in _rows(name, {seed: everyone[f"{name}@{seed}"] for seed in seeds[name]})]
    teacher = [_row(None, {None: row}) for row in everyone.get("teacher", {}).values() if row["model"] == "teacher"]
    return {
        "distance": distance_key(first["floor"]),
        "seeds": seeds,
        "rows": rows,
        "teacher": teacher,
        "floor": _floor(first["floor"]),
        "curvature": [
            _curvature(name, {seed: evaluations[f"{name}@{seed}"] for seed in seeds[name]})
            for name in seeds
            if all(evaluations[f"{name}@{seed}"]["curvature"] for seed in seeds[name])  # else a sampler of its own
        ],
        "losses": [_loss(name, seed, folders[f"{name}@{seed}"]) for name in seeds for seed in seeds[name]],
        "stores": {name: _store(manifest) for name, manifest in stores.items()},
        "reference": next(iter(evaluations.values()))["reference"],
        "cut": next(iter(evaluations.values())).get("cut", []),
        "machines": sorted({machine for row in (*rows, *teacher) for machine in row["machines"]}),
    }


def distances(body: Row) -> Row:
    """The results of a comparison, without anything that depends on the machine or the time."""
    bare = {key: [_without_speeds(row) for row in body[key]] for key in ("rows", "teacher")}
    return {**bare, "floor": _without_speeds(body["floor"]), "curvature": body["curvature"], "seeds": body["seeds"]}


def figures(body: Row) -> dict[str, float]:
    """The summary for the manifest: each student's distance at the smallest NFE."""
    rows = [row for row in body["rows"] if row["sampler"] != REFERENCE]
    fewest = min(row["nfe"] for row in rows)
    return {f"{row['variant']} at NFE {fewest}": mean(row, body["distance"]) for row in rows if row["nfe"] == fewest}


def mean(row: Row, metric: str) -> float:
    return float(row["metrics"][metric]["mean"])


def same_speeds(body: Row) -> list[list[Row]]:
    """Rows of students that are equally fast, in groups: the same network, sampler, NFE and guidance."""
    groups: dict[Any, list[Row]] = {}
    for row in body["rows"]:
        if "images_per_second" in row["speeds"] and row["sampler"] != REFERENCE:
            key = tuple(row[name] for name in ("sampler", "nfe", "guidance", "parameters"))
            groups.setdefault(key, []).append(row)
    return list(groups.values())


def images_per_second(row: Row) -> float:
    return float(row["speeds"]["images_per_second"]["mean"])


def _rows(variant: str, measured: Mapping[int, Mapping[str, Row]]) -> list[Row]:
    """The rows of a variant, one for each sampler. Rows have the same names for every seed."""
    names = [name for name, row in next(iter(measured.values())).items() if row["model"] == "student"]
    return [_row(variant, {seed: found[name] for seed, found in measured.items()}) for name in names]


def _row(variant: str | None, by_seed: Mapping[int | None, Row]) -> Row:
    """The figures of one sampler over seeds. A single measurement has no spread.

    Speeds measured on different machines are left out, because their mean would mean nothing.
    """
    one = next(iter(by_seed.values()))
    machines = sorted({row["machine"] for row in by_seed.values()})
    rates = [key for key in RATES if one.get(key)] if len(machines) == 1 else []
    numbers = [key for key, value in one.items() if isinstance(value, int | float) and key not in (*IDENTITY, *SPEEDS)]
    told = {key: one.get(key) for key in ("sampler", "nfe", "guidance", "samples", "parameters")}
    if told["sampler"] == REFERENCE:  # the number of evaluations, which depends on the seed
        told["nfe"] = math.ceil(np.mean([row["nfe"] for row in by_seed.values()]))
    return {
        "variant": variant,
        "model": one["model"],
        **told,
        **{key: one[key] for key in SETS if key in one},
        "machines": machines,
        "batch": one.get("batch") if rates else None,
        "metrics": {key: _spread({seed: row[key] for seed, row in by_seed.items()}) for key in numbers},
        "speeds": {key: _spread({seed: row.get(key) for seed, row in by_seed.items()}) for key in rates},
    }


def _floor(row: Row) -> Row:
    """The floor of one evaluation. The spread of its distance is over draws of real images."""
    found = _row(None, {None: row})
    found["metrics"][distance_key(row)]["spread"] = row.get("spread")
    return found


def _spread(values: Mapping[int | None, float | None]) -> Row:
    """Mean and sample standard deviation (n - 1) over seeds, and the values themselves."""
    found = np.array([value for value in values.values() if value is not None], float)
    spread = float(found.std(ddof=1)) if len(found) > 1 else None
    by_seed = {str(seed): value for seed, value in values.items() if seed is not None}
    return {"mean": float(found.mean()), "spread": spread, **({"values": by_seed} if by_seed else {})}


def _without_speeds(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in ("speeds", "batch", "machines")}


def _by_name(evaluation: Mapping[str, Any]) -> dict[str, Row]:
    """The rows of an evaluation, each with its machine: an evaluation may have continued on another one."""
    return {row["name"]: {**row, "machine": row.get("machine") or evaluation["machine"]} for row in evaluation["rows"]}


def _curvature(variant: str, by_seed: Mapping[int, Mapping[str, Any]]) -> Row:
    found = {seed: evaluation["curvature"][0] for seed, evaluation in by_seed.items()}
    one = next(iter(found.values()))
    value = _spread({seed: row["value"] for seed, row in found.items()})
    return {"variant": variant, "value": value, "steps": one["steps"], "trajectories": one["trajectories"]}


def _loss(variant: str, seed: int, folder: Path) -> Row:
    """The loss in the training log by pairs seen, and the cost of the training."""
    points = {line["pairs_seen"]: line["loss"] for line in read_lines(folder / METRICS)}
    facts = atomic.read_json(folder / "manifest.json")["metrics"]
    told = {key: facts[key] for key in ("pairs_seen", "pairs_per_second", "parameters")}
    return {"variant": variant, "seed": seed, **told, "curve": [[seen, points[seen]] for seen in sorted(points)]}


def _store(manifest: Mapping[str, Any]) -> Row:
    report = manifest.get("coupling_report") or {}
    told = {key: manifest[key] for key in ("content_digest", "order_key", "records")}
    return {**told, **{key: report[key] for key in REPORTED if report.get(key) is not None}}
