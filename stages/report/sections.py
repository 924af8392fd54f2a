"""The sections of the report, one function each: from input folders to HTML, in the order of the pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nfm.stages.base import Inputs
from nfm.stages.display import plots as plots
from nfm.stages.display.pictures import FALSE_COLOURS, false_colours
from nfm.stages.display.points import are_points, coordinates
from nfm.stages.display.units import duration
from nfm.stages.display.watching.lines import METRICS, read_lines
from nfm.stages.pairs import coupling_advice
from nfm.stages.report.evaluation import Evaluation
from nfm.stages.report.html import code, figure, folded, heading, image_grid, number, paragraph, row, table
from nfm.storage import ImageDataset, PairStore
from nfm.storage.errors import by
from nfm.storage.files.atomic import read_json
from nfm.storage.format.codecs import unpack
from nfm.storage.format.order import permute

SHORT_FINGERPRINT = 12
PAIRS_SHOWN = 8
POINTS_SHOWN = 2000
NOISE_RECORDS = 4096
NOISE_SHOWN = 3.0  # noise from -3 to 3 becomes black to white
ORDER = ("data", "latents", "features", "teacher", "pairs", "student", "evaluate")


def stages(manifests: Mapping[str, Mapping[str, Any]]) -> str:
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
    configs = {role: manifest.get("config") or {} for role, manifest in manifests.items()}
    resolved = folded("Resolved configs", json.dumps(configs, indent=2))
    return table(["stage", "fingerprint", "content", "time", "key figures"], rows) + resolved


def data(root: Path, manifest: Mapping[str, Any], samples: int, seed: int) -> str:
    train = ImageDataset.open(root, "train")
    about = manifest.get("dataset") or {}
    chosen = permute(np.arange(min(samples, len(train))), len(train), f"report/{seed}")
    planar = are_points(train.image_shape)
    what = "points of the plane" if planar else f"images of {by(train.image_shape)} (channels, height, width)"
    text = f"{about.get('name', 'images')}: {len(train):,} training {what}."
    if about:
        text += f" Licence: {about.get('licence')}. Origin: {about.get('origin')}."
    if planar:
        chosen = permute(np.arange(min(POINTS_SHOWN, len(train))), len(train), f"report/{seed}")
        points = coordinates(train.to_float(train.images(chosen)))
        plot = plots.points_of_the_plane({"data": points}, "training points")
        return paragraph(text) + row([figure(plot, "Training points", f"a seeded sample of {len(points):,}")])
    images, caption = train.images(chosen), "a seeded sample"
    if train.dtype != "uint8":
        images, caption = false_colours(images), f"a seeded sample in {FALSE_COLOURS}"
    return paragraph(text) + row([figure(image_grid(images, "training images"), "Training images", caption)])


def teacher(root: Path, manifest: Mapping[str, Any], evaluation: Evaluation | None) -> str:
    log = root / METRICS
    lines = read_lines(log) if log.exists() else []  # one that was trained elsewhere has none
    bits = {"teacher training": _curve(lines, "train_bpd"), "teacher held-out": _curve(lines, "heldout_bpd")}
    if not any(seen for seen, _ in bits.values()):
        bits = {"teacher training": _curve(lines, "loss")}
        unit = "loss (nats per dimension)"
    else:
        unit = "bits per dimension"
    alt = f"teacher's {unit} over images seen"
    plot = plots.curves({name: curve for name, curve in bits.items() if curve[0]}, "images seen", unit, alt)
    figures = [figure(plot, "Training and held-out", "a gap that opens is overfitting")] if lines else []
    grids = evaluation.grids("teacher") if evaluation else []
    text = paragraph(_key_figures(manifest.get("metrics") or {}))
    return text + row(figures) + (heading("Samples") + row(grids) if grids else "")


def pairs(stores: Mapping[str, PairStore], seed: int) -> str:
    body, samples, rows = [], {}, []
    for name, store in stores.items():
        there = store.slots(0)
        slots = there[permute(np.arange(min(NOISE_RECORDS, len(there))), len(there), f"report/{seed}")]
        records = store.gather(0, slots)
        records["noise"] = unpack(records["noise"], store.spec.noise_step)
        samples[name] = records["noise"].ravel()
        if are_points(store.spec.image_shape):
            sets = {role: coordinates(records[role]) for role in ("image", "noise")}
            body.append(figure(plots.points_of_the_plane(sets, f"pairs of {name}"), name, "images and their noise"))
        else:
            body.append(figure(_side_by_side(records), name, "image above, its noise below (black -3, white 3)"))
        moments = store.manifest.get("moments") or {}
        values = [moments.get(key) for key in ("mean", "var", "kurtosis", "min", "max", "nonfinite")]
        rows.append([name, store.draws, len(there), *values])
    columns = [
        "coupling",
        "draws",
        "records a draw",
        "mean",
        "variance",
        "kurtosis",
        "min",
        "max",
        "not finite",
    ]
    expected = ["N(0, 1)", None, None, 0, 1, 3, None, None, 0]
    plot = plots.noise_histogram(samples, "density of noise values against the standard normal")
    caption = f"up to {NOISE_RECORDS:,} seeded records of draw 0; linear left, logarithmic right"
    return (
        row(body)
        + heading("Moments of z")
        + table(columns, [*rows, expected])
        + row([figure(plot, "Values of z against N(0, 1)", caption)])
        + _coupling_reports({name: store.manifest.get("coupling_report") for name, store in stores.items()})
    )


def _coupling_reports(reports: Mapping[str, Mapping[str, Any] | None]) -> str:
    """The coupling reports of the stores side by side, one line for each figure, with advice for bad ones."""
    known = {name: dict(report) for name, report in reports.items() if report}
    if not known:
        return ""
    told = {name: coupling_advice.lines(report) for name, report in known.items()}
    figures = dict.fromkeys(figure for lines in told.values() for figure in lines)
    rows = [[figure, *(lines.get(figure) for lines in told.values())] for figure in figures]
    advice = [f"{name}: {text}" for name, report in known.items() for text in coupling_advice.advice(report)]
    return heading("Coupling reports") + table(["", *told], rows) + "".join(map(paragraph, advice))


def students(roots: Mapping[str, Path], evaluation: Evaluation | None) -> str:
    lines = {name: read_lines(root / METRICS) for name, root in roots.items()}
    losses = {name: curve for name, log in lines.items() if (curve := _curve(log, "loss"))[0]}
    figures = []
    if losses:
        plot = plots.curves(losses, "pairs seen", "flow-matching loss", "students' losses over pairs seen")
        figures.append(figure(plot, "Students' losses", "of each one's own pairs, so levels differ by coupling"))
    body = row(figures)
    if evaluation and (grids := evaluation.grids("student")):
        body += heading("Samples by NFE") + row(grids)
    return body


def read_manifests(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """The manifest of every input in pipeline order; of a store, the manifest of the pinned generation."""
    found = {}
    for role in sorted(inputs, key=lambda role: (ORDER.index(role.split(":")[0]), role)):
        if role.split(":")[0] == "pairs":
            found[role] = dict(PairStore.open(inputs[role]).manifest)
        else:
            found[role] = read_json(inputs[role] / "manifest.json")
    return found


def _curve(lines: Iterable[Mapping[str, Any]], key: str) -> plots.Curve:
    """(seen, values) of a log. A resumed run may log a point twice; then the last one counts."""
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
    if images.dtype != np.uint8:
        images = false_colours(images)
        grey = grey[:, : images.shape[1]]
    return image_grid(np.concatenate([images, grey]), "images above their noise", columns=len(images))


def _key_figures(metrics: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in metrics.items() if isinstance(value, int | float | str)}
    said = [
        f"{key.replace('_', ' ')} {number(value) if isinstance(value, int | float) else value}"
        for key, value in list(plain.items())[:6]
    ]
    return ", ".join(said)
