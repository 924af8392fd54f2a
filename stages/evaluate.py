"""Evaluate: distances of samples to the training set, speeds and curvature, with the floor beside them.

FD-CNN and KID are taken in the features of this run's own classifier (stage `features`), never called FID.
Every row is written when it is measured, so that a stopped evaluation goes on with the next one.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages import features
from nfm.stages.pictures import to_uint8
from nfm.stages.sampling import Sampler, draw, initial, student_sampler, teacher_sampler, velocity
from nfm.stages.stage import Inputs, Reporter, Result, Section, Stopped, operational
from nfm.stages.training import Precision, pick_device
from nfm.storage import ImageDataset, PairStore, atomic

if TYPE_CHECKING:
    from nfm.trainers.cnn import FeatureNet

NAME = "evaluate"
VERSION = 1
TABLE, TEXT, ROWS, SAMPLES = "evaluation.json", "evaluation.txt", "rows", "samples"
SHOWN = 64


class EvaluateConfig(Section):
    """The `[evaluate]` table; `baselines` are couplings whose students are trained and measured beside."""

    baselines: tuple[str, ...] = ()
    nfe: tuple[int, ...] = (31, 15, 7, 5)
    samples: int = 5_000
    teacher_samples: int = 5_000
    guidance: float = 0.0
    kid_subsets: int = 100
    kid_size: int = 1000
    curvature_trajectories: int = 256
    seed: int = 1
    precision: Precision = "float32"
    batch_size: int = 250
    speed_batches: tuple[int, ...] = operational((32, 128, 512))
    device: str = operational("auto")


def run(config: EvaluateConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Measure every sampler against the training set and write the table as JSON and text."""
    device = pick_device(config.device)
    source = ImageDataset.open(inputs["data"], "train")
    reference = _Reference(config, inputs, features.load(inputs["features"], device), report)
    planned = list(_samplers(config, inputs, device))
    tasks = [("floor", lambda: _floor(config, inputs, reference))]
    tasks += [(s.name, lambda s=s: _measure(config, s, source, reference, out, device, report)) for s in planned]
    tasks += [
        (f"curvature-{role}", lambda role=role: _curvature(config, inputs, role, source, device))
        for role in inputs
        if role.startswith("student")
    ]
    for number, (name, measure) in enumerate(tasks):
        if report.stopping:
            raise Stopped
        path = out / ROWS / f"{name}.json"
        if not path.exists():
            atomic.write_json(path, measure())
        report.progress(number + 1, len(tasks), "rows")
        report.say(_line(atomic.read_json(path)))

    measured = [{k: v for k, v in atomic.read_json(out / ROWS / f"{n}.json").items() if k != "digest"} for n, _ in tasks]
    rows = [row for row in measured if "fd_cnn" in row]
    body = {
        "rows": rows,
        "curvature": [row for row in measured if "fd_cnn" not in row],
        "machine": f"{platform.machine()}, {device}, {_threads()} threads",
        "reference": {"rows": len(source), "split": "train"},
    }
    atomic.write_json(out / TABLE, body)
    atomic.write_bytes(out / TEXT, table(body).encode())
    report.say("\n" + table(body))
    best = {f"fd_cnn {row['name']}": row["fd_cnn"] for row in rows}
    pictures = [f"{SAMPLES}/{sampler.name}.npz" for sampler in planned]
    return Result(payload=[TABLE], metrics=best, files=[TEXT, *pictures])


def _samplers(config: EvaluateConfig, inputs: Inputs, device: str) -> Iterator[Sampler]:
    if "teacher" in inputs:
        for score in (False, True):
            yield teacher_sampler(inputs["teacher"], config.guidance, score, device, config.precision)
    for role, folder in inputs.items():
        if role.startswith("student"):
            coupling = PairStore.open(inputs[role.replace("student", "pairs")]).spec.coupling
            for nfe in config.nfe:
                yield student_sampler(folder, coupling, nfe, device, config.precision)


class _Reference:
    """Features of the training set, taken once and only when a row is missing."""

    def __init__(self, config: EvaluateConfig, inputs: Inputs, network: FeatureNet, report: Reporter):
        self.config, self.inputs, self.network, self.report = config, inputs, network, report
        self._train: np.ndarray | None = None

    @property
    def train(self) -> np.ndarray:
        if self._train is None:
            self.report.say("taking the features of the training set")
            self._train = self.of_split("train")
        return self._train

    def of_split(self, name: str) -> np.ndarray:
        split = ImageDataset.open(self.inputs["data"], name)
        chunks = [
            features.extract(self.network, split.images(np.arange(start, min(start + 5000, len(split)))))
            for start in range(0, len(split), 5000)
        ]
        return np.concatenate(chunks)

    def distances(self, found: np.ndarray) -> dict[str, Any]:
        """FD-CNN and KID (with its standard error) of features [N, F] against the training set's."""
        from nfm.trainers.metrics import frechet_distance, kid

        size = min(self.config.kid_size, len(found), len(self.train))
        mean, error = kid(found, self.train, self.config.kid_subsets, size, self.config.seed)
        distance = float(frechet_distance(found, self.train))
        return {"samples": len(found), "fd_cnn": distance, "kid": mean, "kid_error": error, "kid_size": size}


def _floor(config: EvaluateConfig, inputs: Inputs, reference: _Reference) -> dict[str, Any]:
    """The distance of real images that the training set does not hold: no sampler can be expected below it."""
    nothing = ("coupling", "sampler", "nfe", "guidance", "images_per_second", "batch", "latency_seconds", "parameters")
    found = reference.distances(reference.of_split("heldout")[: config.samples])
    return {"name": "floor", "model": "floor", **dict.fromkeys(nothing), **found}


def _measure(
    config: EvaluateConfig, sampler: Sampler, source: ImageDataset, reference: _Reference, out: Path, device: str,
    report: Reporter,
) -> dict[str, Any]:  # fmt: skip
    """One row: the sampler's distances, its best throughput and its latency; its first images go to a file."""
    count = config.teacher_samples if sampler.model == "teacher" else config.samples
    parts, shown = [], []
    for images in draw(sampler.decode, source, count, config.seed, config.batch_size, device):
        if report.stopping:
            raise Stopped
        pixels = to_uint8(images)
        parts.append(features.extract(reference.network, pixels))
        if sum(map(len, shown)) < SHOWN:
            shown.append(pixels)
        report.progress(sum(map(len, parts)), count, "images", row=sampler.name)
    path = out / SAMPLES / f"{sampler.name}.npz"
    with atomic.HashingFile(path) as file:
        file.write(_npz(images=np.concatenate(shown)[:SHOWN]))
    described = {key: value for key, value in sampler._asdict().items() if key != "decode"}
    return {
        **described,
        **reference.distances(np.concatenate(parts)),
        **_speed(config, sampler, source, device),
    }


def _speed(config: EvaluateConfig, sampler: Sampler, source: ImageDataset, device: str) -> dict[str, Any]:
    """Images a second at the best of a few batch sizes, and seconds for one image (median of five)."""
    rates = {}
    for batch in config.speed_batches:
        rates[batch] = batch / _seconds(sampler, source, batch, device, repeats=1)
    best = max(rates, key=lambda batch: rates[batch])
    return {
        "images_per_second": rates[best],
        "batch": best,
        "latency_seconds": _seconds(sampler, source, 1, device, repeats=5),
    }


def _seconds(sampler: Sampler, source: ImageDataset, batch: int, device: str, repeats: int) -> float:
    import torch

    noise, labels = initial(source, np.arange(batch), 0, device)
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        with torch.no_grad():
            sampler.decode(noise, labels).float().cpu()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken[1:]))


def _curvature(
    config: EvaluateConfig, inputs: Inputs, role: str, source: ImageDataset, device: str
) -> dict[str, Any]:
    """How far a student's paths are from straight, per dimension, on 128 uniform Euler steps."""
    import torch

    from nfm.stages import student
    from nfm.stages.teacher import precision_context
    from nfm.trainers.solvers import curvature

    noise, labels = initial(source, np.arange(config.curvature_trajectories), config.seed, device)
    model = student.load(inputs[role], device)
    with torch.no_grad(), precision_context(noise.device.type, config.precision):
        value = float(curvature(velocity(model, labels), noise, steps=128))
    coupling = PairStore.open(inputs[role.replace("student", "pairs")]).spec.coupling
    return {
        "model": "student", "coupling": coupling, "value": value, "steps": 128,
        "trajectories": config.curvature_trajectories,
    }  # fmt: skip


def table(body: dict[str, Any]) -> str:
    """The evaluation as aligned text."""
    header = ["model", "coupling", "sampler", "NFE", "guidance", "samples", "FD-CNN", "KID x 1000", "images/s", "at batch",
              "latency ms", "parameters"]  # fmt: skip
    lines = [header]
    for row in body["rows"]:
        kid = f"{row['kid'] * 1000:.2f} ± {row['kid_error'] * 1000:.2f}"
        cells = [row["model"], row["coupling"], row["sampler"], row["nfe"], row["guidance"], row["samples"],
                 f"{row['fd_cnn']:.2f}", kid]  # fmt: skip
        if row["images_per_second"] is not None:
            latency = f"{row['latency_seconds'] * 1000:.1f}"
            cells += [f"{row['images_per_second']:.0f}", row["batch"], latency, f"{row['parameters']:,}"]
        lines.append(["-" if cell is None else str(cell) for cell in cells + [None] * (len(header) - len(cells))])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
    for row in body["curvature"]:
        text += (
            f"\ncurvature of {row['model']} ({row['coupling']}): {row['value']:.5f}, "
            f"{row['steps']} uniform Euler steps, {row['trajectories']} trajectories"
        )
    return f"{text}\n"


def _line(row: dict[str, Any]) -> str:
    if "fd_cnn" not in row:
        return f"curvature of the student on {row['coupling']} pairs: {row['value']:.5f}"
    return f"{row['name']}: FD-CNN {row['fd_cnn']:.3f}, KID {row['kid']:.5f} on {row['samples']} images"


def _npz(**arrays: np.ndarray) -> bytes:
    import io

    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    return data.getvalue()


def _threads() -> int:
    import torch

    return torch.get_num_threads()
