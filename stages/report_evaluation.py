"""The evaluation as the report shows it: table, plot and grids from `evaluation.json` and its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nfm.stages import report_plots as plots
from nfm.stages.report_page import figure, heading, image_grid, number, paragraph, row, table
from nfm.storage.atomic import read_json

Line = Mapping[str, Any]  # one row of evaluation.json; figures that a row cannot have are null or absent


def _times_1000(key: str) -> Callable[[Line], float | None]:
    return lambda line: None if line.get(key) is None else 1000 * line[key]


COLUMNS: dict[str, Callable[[Line], Any]] = {
    "model": lambda line: line["model"],
    "coupling": lambda line: line.get("coupling"),
    "sampler": lambda line: line.get("sampler"),
    "NFE": lambda line: line.get("nfe"),
    "guidance": lambda line: line.get("guidance"),
    "samples": lambda line: line.get("samples"),
    "FD-CNN": lambda line: line["fd_cnn"],
    "KID × 1000": _times_1000("kid"),
    "± s.e.": _times_1000("kid_error"),
    "images/s": lambda line: line.get("images_per_second"),
    "at batch": lambda line: line.get("batch"),
    "latency, ms": _times_1000("latency_seconds"),
    "parameters": lambda line: line.get("parameters"),
}


class Evaluation:
    """`evaluation.json` and the samples beside it, as table, plot and grids."""

    def __init__(self, root: Path, samples: int):
        self.root, self.samples = root, samples
        self.body = read_json(root / "evaluation.json")
        self.rows: list[dict[str, Any]] = list(self.body["rows"])

    def lead(self) -> list[str]:
        """One sentence: the students at the fewest Heun steps, the teacher and the floor."""
        heun = [line for line in self.rows if line["model"] == "student" and line["sampler"] == "heun"]
        if not heun:
            return []
        fewest = min(line["nfe"] for line in heun)
        shown = [line for line in heun if line["nfe"] == fewest]
        shown += [line for line in self.rows if line["model"] in ("teacher", "floor")]
        said = [f"{_row_title(line)}: {number(line['fd_cnn'], 3)}" for line in shown]
        return [f"FD-CNN, lower is better. {'; '.join(said)}."]

    def section(self) -> str:
        cells = [[show(line) for show in COLUMNS.values()] for line in self.rows]
        reference = self.body.get("reference") or {}
        text = (
            f"Distances to {reference.get('rows', 0):,} images of the {reference.get('split', 'train')} split"
            " in the features of our own CNN: FD-CNN compares within this report only and is not FID. The "
            "floor is the distance of real held-out images. Tinted: the best student at each NFE. "
            f"Measured on: {self.body.get('machine', 'unknown machine')}."
        )
        measured = table(list(COLUMNS), cells, self._best())
        return paragraph(text) + measured + self._plot() + self._curvature()

    def grids(self, model: str) -> list[str]:
        """A grid for every row of that model that has samples, by NFE, couplings beside each other."""
        lines = [line for line in self.rows if line["model"] == model]
        lines.sort(key=lambda line: -(line.get("nfe") or 0))
        figures = []
        for line in lines:
            file = self.root / "samples" / f"{line['name']}.npz"
            if file.is_file():
                with np.load(file, allow_pickle=False) as arrays:
                    images = arrays["images"][: self.samples]
                caption = f"FD-CNN {number(line['fd_cnn'], 3)}"
                grid = image_grid(images, f"samples of {line['name']}")
                figures.append(figure(grid, _row_title(line), caption))
        return figures

    def _best(self) -> list[int]:
        best: dict[tuple[str, int], int] = {}
        for i, line in enumerate(self.rows):
            if line["model"] == "student":
                key = (line["sampler"], line["nfe"])
                if key not in best or line["fd_cnn"] < self.rows[best[key]]["fd_cnn"]:
                    best[key] = i
        return list(best.values())

    def _plot(self) -> str:
        lines: dict[str, tuple[list[float], list[float]]] = {}
        for line in sorted((r for r in self.rows if r["model"] == "student"), key=lambda r: r["nfe"]):
            nfe, distance = lines.setdefault(str(line["coupling"]), ([], []))
            nfe.append(line["nfe"])
            distance.append(line["fd_cnn"])
        if not lines:
            return ""
        levels = {_row_title(line): (line["model"], line["fd_cnn"]) for line in self.rows if line["model"] != "student"}
        plot = plots.distance_by_nfe(lines, levels, "FD-CNN against NFE by coupling")
        return row([figure(plot, "FD-CNN against NFE", "Euler at 5 and below, Heun above; NFE logarithmic")])

    def _curvature(self) -> str:
        lines = self.body.get("curvature") or []
        if not lines:
            return ""
        columns = ["model", "coupling", "curvature", "Euler steps", "trajectories"]
        rows = [[line[key] for key in ("model", "coupling", "value", "steps", "trajectories")] for line in lines]
        text = "Mean squared deviation of velocity from the straight line along generated paths; 0 is straight."
        return heading("Curvature") + paragraph(text) + table(columns, rows)


def _row_title(line: Line) -> str:
    if line["model"] == "student":
        return f"{line['coupling']} student, {str(line['sampler']).capitalize()}, NFE {line['nfe']}"
    sampler = f", {line['sampler']}" if line.get("sampler") else ""
    guidance = f", guidance {line['guidance']:g}" if line.get("guidance") else ""
    return f"{line['model']}{sampler}{guidance}"
