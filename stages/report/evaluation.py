"""The evaluation in the report: table, plot and grids from `evaluation.json` and its samples."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nfm.stages.base import StageError
from nfm.stages.display import plots as plots
from nfm.stages.display.points import coordinates
from nfm.stages.evaluation.table import DISTANCE, below, columns_of, cut, distance_key
from nfm.stages.report.headline import sentences, title
from nfm.stages.report.html import figure, heading, image_grid, number, paragraph, row, table
from nfm.storage.files.atomic import read_json
from nfm.storage.files.small_files import opened

MEANT = {
    "fd_cnn": " in the features of our own CNN: FD-CNN compares within this report only and is not FID",
    "fid": " in the features of Inception-v3",
    "w2": ": the exact Wasserstein-2 distance of as many points on either side, in the data's own units",
}


class Evaluation:
    """`evaluation.json` and its samples, as table, plot and grids with the names of the classes."""

    def __init__(self, root: Path, samples: int, classes: Sequence[str] = ()):
        self.root, self.samples, self.classes = root, samples, classes
        self.body = read_json(root / "evaluation.json")
        self.rows: list[dict[str, Any]] = list(self.body["rows"])
        self.key = distance_key(self.rows[0])
        self.title = DISTANCE[self.key]

    def lead(self) -> list[str]:
        return sentences(self.body)

    def section(self) -> str:
        columns = columns_of(self.rows)
        cells = [[column.value(line) for column in columns] for line in self.rows]
        reference = self.body.get("reference") or {}
        text = (
            f"Distances to {reference.get('rows', 0):,} images of the {reference.get('split', 'train')} split"
            f"{MEANT[self.key]}. The floor is the distance of real held-out images with the samples' labels"
            f"{', ± over draws of them' if any(line.get('spread') for line in self.rows) else ''}. "
            f"Tinted: the best student at each NFE. Measured on: {self.body.get('machine', 'unknown machine')}."
        )
        measured = table([column.title for column in columns], cells, self._best())
        told = "".join(map(paragraph, [*cut(self.body), *below(self.rows)]))
        return paragraph(text) + measured + told + self._plot() + self._curvature()

    def grids(self, model: str) -> list[str]:
        """A grid for each row of this model with samples, sorted by NFE, couplings side by side."""
        lines = [line for line in self.rows if line["model"] == model]
        lines.sort(key=lambda line: -(line.get("nfe") or 0))
        figures = []
        for line in lines:
            file = self.root / "samples" / f"{line['name']}.npz"
            if file.is_file():
                images, labels = _samples(file, self.root)
                images, alt = images[: self.samples], f"samples of {line['name']}"
                caption = f"{self.title} {number(line[self.key], 3)}"
                if images.dtype != np.uint8:
                    picture = plots.points_of_the_plane({"samples": coordinates(images)}, alt)
                    caption = f"{len(images):,} points, {caption}"
                else:
                    picture = image_grid(images, alt, labels=labels, names=self.classes)
                figures.append(figure(picture, title(line), caption))
        return figures

    def _best(self) -> list[int]:
        best: dict[tuple[str, int], int] = {}
        for i, line in enumerate(self.rows):
            if line["model"] == "student":
                key = (line["sampler"], line["nfe"])
                if key not in best or line[self.key] < self.rows[best[key]][self.key]:
                    best[key] = i
        return list(best.values())

    def _plot(self) -> str:
        lines: dict[str, tuple[list[float], list[float]]] = {}
        for line in sorted((r for r in self.rows if r["model"] == "student"), key=lambda r: r["nfe"]):
            nfe, distance = lines.setdefault(str(line["coupling"]), ([], []))
            nfe.append(line["nfe"])
            distance.append(line[self.key])
        if not lines:
            return ""
        levels = {title(line): (line["model"], line[self.key]) for line in self.rows if line["model"] != "student"}
        taken: dict[str, list[int]] = {}  # the NFE of each solver in the rows
        for line in self.rows:
            if line["model"] == "student":
                taken.setdefault(str(line["sampler"]), []).append(line["nfe"])
        plot = plots.distance_by_nfe(lines, levels, f"{self.title} against NFE by coupling", self.title, taken)
        return row([figure(plot, f"{self.title} against NFE", _solvers(taken))])

    def _curvature(self) -> str:
        lines = self.body.get("curvature") or []
        if not lines:
            return ""
        columns = ["model", "coupling", "curvature", "Euler steps", "trajectories"]
        rows = [[line[key] for key in ("model", "coupling", "value", "steps", "trajectories")] for line in lines]
        text = "Mean squared deviation of velocity from the straight line along generated paths; 0 is straight."
        return heading("Curvature") + paragraph(text) + table(columns, rows)


def _solvers(taken: Mapping[str, list[int]]) -> str:
    said = [f"{name.capitalize()} at {', '.join(map(str, sorted(set(nfe))))}" for name, nfe in sorted(taken.items())]
    return f"{'; '.join(said)}; NFE logarithmic"


def _samples(file: Path, root: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Images with their labels, or without for older files."""
    try:
        with opened(file, root) as source, np.load(source, allow_pickle=False) as arrays:
            return np.asarray(arrays["images"]), np.asarray(arrays["labels"]) if "labels" in arrays else None
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        remedy = "remove that evaluation's folder and run the same command again"
        raise StageError(f"{file}: no samples of an evaluation ({error}); {remedy}") from error
