"""Evaluate: distances of samples to the training set, speeds and curvature, with the floor beside them.

FD-CNN and KID are taken in the features of this run's own classifier (stage `features`), never called FID.
Every row is written when it is measured, so that a stopped evaluation goes on with the next one.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from nfm.stages.sampling import EULER_UP_TO, Sampler, student_sampler, teacher_sampler
from nfm.stages.stage import Inputs, Reporter, Result, Section, Stopped, operational
from nfm.stages.tables import aligned
from nfm.stages.training import Precision, pick_device
from nfm.storage import atomic

if TYPE_CHECKING:
    from pathlib import Path

NAME = "evaluate"
VERSION = 1
TABLE, TEXT, DISTANCES, ROWS, SAMPLES = "evaluation.json", "evaluation.txt", "distances.json", "rows", "samples"
SPEEDS = ("images_per_second", "batch", "latency_seconds")  # of a machine and a moment: never in the content digest


class EvaluateConfig(Section):
    """The `[evaluate]` table; `baselines` are couplings whose students are trained and measured beside."""

    baselines: tuple[Literal["nfm", "independent"], ...] = ()
    nfe: tuple[int, ...] = (31, 15, 7, 5)
    samples: int = Field(5_000, ge=2)
    guidance: float = 0.0
    kid_subsets: int = Field(100, ge=2)
    kid_size: int = Field(1000, ge=2)
    curvature_trajectories: int = Field(256, ge=1)
    seed: int = Field(1, ge=0)
    precision: Precision = "float32"
    batch_size: int = Field(250, ge=1)
    speed_batches: tuple[int, ...] = operational((32, 128, 512))
    device: str = operational("auto")

    @field_validator("nfe")
    @classmethod
    def _solvers_can(cls, nfe: tuple[int, ...]) -> tuple[int, ...]:
        for count in nfe:
            if count < 1 or (count > EULER_UP_TO and count % 2 == 0):
                raise ValueError(f"{count} evaluations: Heun takes 2N - 1, use odd numbers above {EULER_UP_TO}")
        return nfe


def run(config: EvaluateConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Measure every sampler against the training set and write the table as JSON and text.

    Every row is of the same number of images, `samples` or as many as are held out: the distances' bias depends on it.
    """
    from nfm.stages.measures import Bench

    device = pick_device(config.device)
    bench = Bench(config, inputs, out, device, report)
    samplers = list(_samplers(config, inputs, device))
    pictures = [f"{SAMPLES}/{sampler.name}.npz" for sampler in samplers]
    measures: dict[str, Callable[[], dict[str, Any]]] = {"floor": bench.floor}
    measures |= {s.name: partial(bench.sampler, s, out / picture) for s, picture in zip(samplers, pictures)}
    measures |= {f"curvature-{role}": partial(bench.curvature, role) for role in inputs if role.startswith("student")}

    measured = []
    for number, (name, measure) in enumerate(measures.items()):
        if report.stopping:
            raise Stopped
        path = out / ROWS / f"{name}.json"
        if not path.exists():
            atomic.write_json(path, measure())
        row = atomic.read_json(path)
        del row["digest"]
        measured.append(row)
        report.say(f"{number + 1} of {len(measures)}, {_line(row)}")

    body: dict[str, Any] = {
        "rows": [row for row in measured if "fd_cnn" in row],
        "curvature": [row for row in measured if "fd_cnn" not in row],
        "machine": f"{platform.machine()}, {device}, {_threads()} threads",
        "reference": {"rows": len(bench.source), "split": "train"},
    }
    bare = [{key: value for key, value in row.items() if key not in SPEEDS} for row in body["rows"]]
    atomic.write_json(out / DISTANCES, {"rows": bare, "curvature": body["curvature"], "reference": body["reference"]})
    atomic.write_json(out / TABLE, body)
    atomic.write_bytes(out / TEXT, as_text(body).encode())
    report.say(f"\n{as_text(body)}")
    figures = {f"FD-CNN {row['name']}": row["fd_cnn"] for row in body["rows"]}
    return Result(payload=[DISTANCES], metrics=figures, files=[TABLE, TEXT, *pictures])


def _samplers(config: EvaluateConfig, inputs: Inputs, device: str) -> Iterator[Sampler]:
    from nfm.stages.measures import coupling_of

    if "teacher" in inputs:
        for score in (False, True):
            yield teacher_sampler(inputs["teacher"], config.guidance, score, device, config.precision)
    for role, folder in inputs.items():
        if role.startswith("student"):
            for nfe in config.nfe:
                yield student_sampler(folder, coupling_of(inputs, role), nfe, device, config.precision)


def as_text(body: dict[str, Any]) -> str:
    """The evaluation as aligned columns, curvature below."""
    columns: dict[str, Callable[[dict[str, Any]], Any]] = {
        "model": lambda row: row["model"],
        "coupling": lambda row: row["coupling"],
        "sampler": lambda row: row["sampler"],
        "NFE": lambda row: row["nfe"],
        "guidance": lambda row: row["guidance"],
        "samples": lambda row: row["samples"],
        "FD-CNN": lambda row: f"{row['fd_cnn']:.2f}",
        "KID x 1000": lambda row: f"{row['kid'] * 1000:.2f} ± {row['kid_error'] * 1000:.2f}",
        "images/s": lambda row: row["images_per_second"] and f"{row['images_per_second']:.0f}",
        "at batch": lambda row: row["batch"],
        "latency ms": lambda row: row["latency_seconds"] and f"{row['latency_seconds'] * 1000:.1f}",
        "parameters": lambda row: row["parameters"] and f"{row['parameters']:,}",
    }
    text = aligned(list(columns), [[cell(row) for cell in columns.values()] for row in body["rows"]])
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


def _threads() -> int:
    import torch

    return torch.get_num_threads()
