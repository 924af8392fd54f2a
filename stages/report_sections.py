"""The report's sections, one function each: from input folders to HTML, in the order of the pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nfm.stages import report_plots as plots
from nfm.stages.report_page import (
    code,
    duration,
    figure,
    folded,
    heading,
    image_grid,
    number,
    paragraph,
    row,
    table,
)
from nfm.stages.stage import Inputs, StageError
from nfm.storage import ImageDataset, PairStore
from nfm.storage.atomic import read_json
from nfm.storage.generations import newest
from nfm.storage.order import permute

SHORT_FINGERPRINT = 12
PAIRS_SHOWN = 8
NOISE_RECORDS = 4096
NOISE_SHOWN = 3.0  # noise from -3 to 3 becomes black to white
ORDER = ("data", "features", "teacher", "pairs", "student", "evaluate")


def stages(inputs: Inputs, manifests: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [
            role,
            code(str(manifest["fingerprint"])[:SHORT_FINGERPRINT]),
            code(str(manifest["content_digest"])[:SHORT_FINGERPRINT]),
            duration(float(manifest.get("seconds") or 0.0)),
            _key_figures(manifest.get("metrics") or {}),
        ]
        for role, manifest in manifests.items()
    ]
    configs = [
        folded(f"{role}: resolved config", json.dumps(manifest.get("config") or {}, indent=2, sort_keys=True))
        for role, manifest in manifests.items()
    ]
    return table(["stage", "fingerprint", "content", "time", "key figures"], rows) + "".join(configs)


def data(root: Path, manifest: Mapping[str, Any], samples: int, seed: int) -> str:
    train = ImageDataset.open(root, "train")
    about = manifest.get("dataset") or {}
    chosen = permute(np.arange(min(samples, len(train))), len(train), f"report/{seed}")
    shape = " x ".join(map(str, train.image_shape))
    text = f"{about.get('name', 'images')}: {len(train):,} training images of {shape} (channels, height, width)."
    if about:
        text += f" Licence: {about.get('licence')}. Origin: {about.get('origin')}."
    picture = image_grid(train.images(chosen), "training images")
    return paragraph(text) + row([figure(picture, "Training images", "a seeded sample")])


def teacher(root: Path, manifest: Mapping[str, Any], evaluation: Evaluation | None) -> str:
    lines = read_lines(root / "metrics.jsonl")
    bits = {"teacher": _curve(lines, "train_bpd"), "teacher held-out": _curve(lines, "heldout_bpd")}
    if not any(seen for seen, _ in bits.values()):
        bits = {"teacher": _curve(lines, "loss")}
        unit = "loss (nats per dimension)"
    else:
        unit = "bits per dimension"
    alt = f"teacher's {unit} over images seen"
    plot = plots.curves({name: curve for name, curve in bits.items() if curve[0]}, "images seen", unit, alt)
    figures = [figure(plot, "Training and held-out", "a gap that opens is overfitting")] if lines else []
    grids = evaluation.grids("teacher") if evaluation else []
    return row(figures) + (heading("Samples") + row(grids) if grids else "")


def pairs(stores: Mapping[str, PairStore], classes: list[str], seed: int) -> str:
    body, samples, rows = [], {}, []
    for name, store in stores.items():
        count = min(NOISE_RECORDS, len(store))
        slots = permute(np.arange(count), len(store), f"report/{seed}")
        records = store.gather(0, slots)
        samples[name] = np.asarray(records["noise"], np.float32).ravel()
        body.append(figure(_side_by_side(records), name, "image above, its noise below (black -3, white 3)"))
        moments = store.manifest.get("moments") or {}
        values = [moments.get(key) for key in ("mean", "var", "kurtosis", "min", "max", "nonfinite")]
        rows.append([name, store.draws, len(store), *values])
    columns = ["coupling", "draws", "records a draw", "mean", "variance", "kurtosis", "min", "max", "not finite"]
    expected = ["N(0, 1)", None, None, 0, 1, 3, None, None, 0]
    plot = plots.noise_histogram(samples, "density of noise values against the standard normal")
    caption = f"up to {NOISE_RECORDS:,} seeded records of draw 0; linear left, logarithmic right"
    return (
        row(body)
        + heading("Moments of z")
        + table(columns, [*rows, expected])
        + row([figure(plot, "Values of z against N(0, 1)", caption)])
    )


def students(roots: Mapping[str, Path], evaluation: Evaluation | None) -> str:
    lines = {name: read_lines(root / "metrics.jsonl") for name, root in roots.items()}
    losses = {name: curve for name, log in lines.items() if (curve := _curve(log, "loss"))[0]}
    figures = []
    if losses:
        plot = plots.curves(losses, "pairs seen", "flow-matching loss", "students' losses over pairs seen")
        figures.append(figure(plot, "Students' losses", "of each one's own pairs, so levels differ by coupling"))
    body = row(figures)
    if evaluation and (grids := evaluation.grids("student")):
        body += heading("Samples by NFE") + row(grids)
    return body


class Evaluation:
    """`evaluation.json` and the samples beside it, as table, plot and grids."""

    def __init__(self, root: Path, samples: int):
        self.root, self.samples = root, samples
        self.body = read_json(root / "evaluation.json")
        self.rows: list[dict[str, Any]] = list(self.body["rows"])
        self.seconds: dict[str, float] = {}

    def lead(self) -> list[str]:
        """One sentence: the students at the fewest Heun steps, the teacher and the floor."""
        heun = [line for line in self.rows if line["model"] == "student" and line["sampler"] == "heun"]
        if not heun:
            return []
        fewest = min(line["nfe"] for line in heun)
        said = [f"{line['coupling']} student {number(line['fd_cnn'], 3)}" for line in heun if line["nfe"] == fewest]
        others = [line for line in self.rows if line["model"] in ("teacher", "floor")]
        said += [f"{_row_title(line)} {number(line['fd_cnn'], 3)}" for line in others]
        return [f"FD-CNN (lower is better) at {fewest} function evaluations: {'; '.join(said)}."]

    def section(self) -> str:
        columns = ["row", "coupling", "sampler", "NFE", "guidance", "samples", "FD-CNN", "KID × 1000", "± s.e."]
        columns += ["images/s", "at batch", "latency, ms", "parameters"]
        rows = []
        for line in self.rows:
            kid = [_times_1000(line["kid"]), _times_1000(line["kid_error"])]
            latency = _times_1000(line["latency_seconds"])
            rows.append(
                [line["name"], line["coupling"], line["sampler"], line["nfe"], line["guidance"], line["samples"]]
                + [line["fd_cnn"], *kid, line["images_per_second"], line["batch"], latency, line["parameters"]]
            )
        reference = self.body.get("reference") or {}
        text = (
            f"Distances to {reference.get('rows', 0):,} images of the {reference.get('split', 'train')} split, in the "
            "features of our own CNN: FD-CNN is comparable within this report only and is not FID. The floor is the "
            "distance of real held-out images. The tinted rows are the best student at each NFE. "
            f"Measured on: {self.body.get('machine', 'unknown machine')}."
        )
        return paragraph(text) + table(columns, rows, self._best()) + self._plot() + self._curvature()

    def grids(self, model: str) -> list[str]:
        """A grid for every row of that model that has samples, by NFE, couplings beside each other."""
        lines = [line for line in self.rows if line["model"] == model]
        lines.sort(key=lambda line: -(line["nfe"] or 0))
        figures = []
        for line in lines:
            file = self.root / "samples" / f"{line['name']}.npz"
            if file.is_file():
                with np.load(file, allow_pickle=False) as arrays:
                    images = arrays["images"][: self.samples]
                caption = f"FD-CNN {number(line['fd_cnn'], 3)}"
                figures.append(figure(image_grid(images, f"samples of {line['name']}"), _row_title(line), caption))
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
        levels = {
            _row_title(line): (line["model"], line["fd_cnn"]) for line in self.rows if line["model"] != "student"
        }
        plot = plots.distance_by_nfe(lines, levels, "FD-CNN against NFE by coupling")
        return row([figure(plot, "FD-CNN against NFE", "Euler at 5 and below, Heun above; both axes logarithmic")])

    def _curvature(self) -> str:
        lines = self.body.get("curvature") or []
        if not lines:
            return ""
        columns = ["model", "coupling", "curvature", "Euler steps", "trajectories"]
        rows = [[line[key] for key in ("model", "coupling", "value", "steps", "trajectories")] for line in lines]
        text = "Mean squared deviation of the velocity from the straight line along generated paths; 0 is straight."
        return heading("Curvature") + paragraph(text) + table(columns, rows)


def read_manifests(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """The manifest of every input in pipeline order; of a store, its newest generation's."""
    found = {}
    for role in sorted(inputs, key=lambda role: (ORDER.index(role.split(":")[0]), role)):
        if role.split(":")[0] == "pairs":
            sealed = newest(inputs[role])
            if sealed is None:
                raise StageError(f"{inputs[role]}: this pair store has no sealed generation: run the pairs stage")
            found[role] = sealed[1]
        else:
            found[role] = read_json(inputs[role] / "manifest.json")
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines of a training log; lines cut short by a kill are left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _curve(lines: Iterable[Mapping[str, Any]], key: str) -> plots.Curve:
    """(seen, values) in order of what was seen; a resumed run may log the same point twice, the last one counts."""
    points: dict[float, float] = {}
    for line in lines:
        seen = line.get("images_seen", line.get("pairs_seen"))
        if seen is not None and line.get(key) is not None:
            points[float(seen)] = float(line[key])
    return sorted(points), [points[seen] for seen in sorted(points)]


def _side_by_side(records: Mapping[str, np.ndarray]) -> str:
    images = np.asarray(records["image"][:PAIRS_SHOWN])
    noise = np.asarray(records["noise"][:PAIRS_SHOWN], np.float32)
    grey = np.clip((noise / NOISE_SHOWN + 1) * 127.5, 0, 255).astype(np.uint8)
    return image_grid(np.concatenate([images, grey]), "images above their noise", columns=len(images))


def _row_title(line: Mapping[str, Any]) -> str:
    if line["model"] == "student":
        return f"{line['coupling']} student, {str(line['sampler']).capitalize()}, NFE {line['nfe']}"
    sampler = f", {line['sampler']}" if line["sampler"] else ""
    guidance = f", guidance {line['guidance']:g}" if line["guidance"] else ""
    return f"{line['model']}{sampler}{guidance}"


def _times_1000(value: float | None) -> float | None:
    return None if value is None else 1000 * value


def _key_figures(metrics: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in metrics.items() if isinstance(value, int | float | str)}
    said = [
        f"{key.replace('_', ' ')} {number(value) if isinstance(value, int | float) else value}"
        for key, value in list(plain.items())[:6]
    ]
    return ", ".join(said)
