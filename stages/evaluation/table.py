"""The columns of an evaluation, for its text and for the report, and which of them is its distance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nfm.stages.display.tables import aligned
from nfm.stages.evaluation import inception

if TYPE_CHECKING:
    from nfm.stages.evaluation.config import EvaluateConfig

Line = Mapping[str, Any]  # one row of evaluation.json; figures that a row cannot have are null or absent

# The distances for comparing rows. Each row has exactly one of these keys.
DISTANCE = {"fd_cnn": "FD-CNN", "fid": "FID", "w2": "W2"}

BEYOND = 2  # spreads of the floor: a value lower than that is no accident
MEMORISED = 0.8  # samples nearer to training images than this share of what real images are
LEVEL = 0.1  # of the larger of two distances: those of other seeds differ by 2 to 20 % (docs/results.md)
STRAINED = 1.5  # times its own best: from here on, few evaluations are what a coupling suffers from


# To published statistics: FID with the published weights, and what it may be called with others.
PUBLISHED = {"fid_published": "FID, published", "fd_published": "FD, published (other weights)"}


class Column(NamedTuple):
    """A figure of a row, times `scale`. `spelled` is its format in text."""

    title: str
    key: str
    scale: float = 1.0
    spelled: str = ""

    def value(self, line: Line) -> Any:
        value = line.get(self.key)
        return value if value is None or self.scale == 1.0 else self.scale * value


COLUMNS = (
    Column("model", "model"),
    Column("coupling", "coupling"),
    Column("sampler", "sampler"),
    Column("NFE", "nfe"),
    Column("guidance", "guidance", spelled="g"),
    Column("samples", "samples"),
    *(Column(title, key, spelled=".4f" if key == "w2" else ".4g") for key, title in DISTANCE.items()),
    Column("± draws", "spread", spelled=".2g"),
    Column("± s.e.", "w2_error", spelled=".4f"),
    Column("points a set", "w2_points", spelled=","),
    Column("sets", "w2_sets"),
    *(Column(title, key, spelled=".2f") for key, title in PUBLISHED.items()),
    Column("at infinity", "fd_infinity", spelled=".2f"),
    Column("KID × 1000", "kid", 1000, ".2f"),
    Column("± s.e.", "kid_error", 1000, ".2f"),
    Column("precision", "precision", spelled=".3f"),
    Column("recall", "recall", spelled=".3f"),
    Column("density", "density", spelled=".3f"),
    Column("coverage", "coverage", spelled=".3f"),
    Column("sliced W2", "sliced_wasserstein", spelled=".4f"),
    Column("agreement", "agreement", spelled=".3f"),
    Column("nearest", "nearest", spelled=".4f"),
    Column("images/s", "images_per_second", spelled=",.0f"),
    Column("at batch", "batch"),
    Column("latency, ms", "latency_seconds", 1000, ".1f"),
    Column("parameters", "parameters", spelled=","),
)


def distance_key(of: EvaluateConfig | Line) -> str:
    """The key in `DISTANCE` of an evaluation with this config, or of this row.

    Raises ValueError for a row without one.
    """
    if not isinstance(of, Mapping):
        return {"cnn": "fd_cnn", "inception": "fid", "none": "w2"}[of.features]
    for key in DISTANCE:
        if key in of:
            return key
    raise ValueError(f"row {of.get('name')!r} holds no distance; one of {', '.join(DISTANCE)} was expected")


def published_key(config: EvaluateConfig) -> str:
    """The key in `PUBLISHED` of an evaluation with this config, which names statistics."""
    known = inception.weights_sha256(config.inception_weights).startswith(inception.PUBLISHED)
    return "fid_published" if known else "fd_published"


def columns_of(rows: Sequence[Line]) -> list[Column]:
    """The columns in which at least one row has a value."""
    return [column for column in COLUMNS if any(column.value(row) is not None for row in rows)]


def as_text(body: dict[str, Any]) -> str:
    """The evaluation as aligned columns, with curvature below."""
    columns = columns_of(body["rows"])
    cells = [[_spelled(column, row) for column in columns] for row in body["rows"]]
    text = aligned([column.title for column in columns], cells)
    for row in body["curvature"]:
        text += (
            f"\ncurvature of {row['model']} ({row['coupling']}), unguided: {row['value']:.4g}, "
            f"{row['steps']} uniform Euler steps, {row['trajectories']} trajectories"
        )
    for key, told in {"ema": "students by their moving average", "diffusion": "noise of the solver:"}.items():
        if key in body["solver"]:
            text += f"\n{told} {body['solver'][key]}"
    return "\n".join([text, *cut(body), *below(body["rows"])]) + "\n"


def cut(body: Mapping[str, Any]) -> list[str]:
    """A sentence for each field that asked for more images than there are; earlier evaluations did not keep them."""
    return [f"{said}." for said in body.get("cut", [])]


def below(rows: Sequence[Line]) -> list[str]:
    """A sentence for each row whose distance is below the floor by more than its spread explains, and what it means."""
    told = []
    for floor in (row for row in rows if row["model"] == "floor"):
        key = distance_key(floor)
        spread = floor.get("spread") or floor.get("w2_error") or math.inf  # unknown: then nothing is told
        for row in rows:
            if row[key] < floor[key] - BEYOND * spread:
                lower = f"{DISTANCE[key]} {row[key]:.4g} is below the floor of {floor[key]:.4g} ± {spread:.2g}"
                told.append(f"{row['name']}: {lower}, {_why(row, floor)}.")
    return told


def level(one: float, other: float, spread: float) -> bool:
    """Whether two distances differ by no more than their spread, or `LEVEL` of the larger."""
    return abs(one - other) <= max(spread, LEVEL * max(one, other))


def strained(distances: Mapping[int, float]) -> list[int]:
    """The NFEs, largest first, with so few evaluations that they are what is missing, from distances by NFE."""
    best = min(distances, key=lambda nfe: distances[nfe])  # with more than this, it is not the steps
    fewer = [nfe for nfe in distances if nfe < best and distances[nfe] >= STRAINED * distances[best]]
    return sorted(fewer, reverse=True)


def _why(row: Line, floor: Line) -> str:
    near, real = row.get("nearest"), floor.get("nearest")
    if near is None or real is None:
        return "which no sampler can be: a fault of the metric, or a memorised training set"
    seen = f"the nearest training image is {near:.4g} away, of a real one {real:.4g}"
    if near < MEMORISED * real:
        return f"and {seen}: the training set is memorised"
    return f"but {seen}: not memorised, so the metric does not see what is wrong"


def _spelled(column: Column, row: Line) -> str | None:
    value = column.value(row)
    return None if value is None else format(value, column.spelled)
