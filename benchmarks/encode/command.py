"""`python -m benchmarks.encode`: how fast a teacher encodes, its share of the matrix products, and where time goes."""

from __future__ import annotations

import json
import os
import re
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.told import command, machine, versions
from nfm.pipeline.cli.options import LocalPath, OutputFile
from nfm.stages.display.endings import JSON
from nfm.stages.display.tables import aligned

if TYPE_CHECKING:
    from benchmarks.encode.rows import Case

TARGET = 0.6  # of the best matrix-product rate, from width 256 on
TARGET_WIDTH = 256
RAY_TARGET = 0.95  # of the serial executor
_SMALL = {"image_shape": (1, 28, 28), "classes": 10, "patch": 4, "blocks": 4, "layers": 4, "head_size": 64}
_LARGE = _SMALL | {"image_shape": (3, 64, 64), "classes": 1000}
PRESETS: dict[str, dict[str, Any]] = {
    "width 128": _SMALL | {"channels": 128, "batch": 128},  # the batch is the plain loop's
    "width 256": _LARGE | {"channels": 256, "batch": 64},
    "width 512": _LARGE | {"channels": 512, "batch": 16},
}


@click.command()
@click.option("-c", "--config", type=LocalPath(exists=True), help="Take the teacher's sizes from its [teacher].")
@click.option("--image", help="CxHxW. Without -c and --image the presets are measured: widths 128, 256 and 512.")
@click.option("--classes", default=10, show_default=True, type=click.IntRange(min=0))
@click.option("--patch", default=4, show_default=True, type=click.IntRange(min=1))
@click.option("--channels", default=256, show_default=True, type=click.IntRange(min=1))
@click.option("--blocks", default=4, show_default=True, type=click.IntRange(min=1))
@click.option("--layers", default=4, show_default=True, type=click.IntRange(min=1))
@click.option("--head-size", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--batch", type=click.IntRange(min=1), help="Of the plain loop; ours are probed. [default: 64]")
@click.option(
    "--preset", "presets", multiple=True, type=click.Choice(list(PRESETS)), help="Only this; may be repeated."
)
@click.option("--passes", default=7, show_default=True, type=click.IntRange(min=1), help="Medians are taken of these.")
@click.option("--threads", type=click.IntRange(min=1), help="Of the CPU. [default: all cores]")
@click.option("--device", default="auto", show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True, help="Also compiled layers.")
@click.option("--ray", is_flag=True, help="Also one Ray actor against the serial executor: a minute more.")
@click.option("--quick", is_flag=True, help="A small run that shows that all works; its figures mean nothing.")
@click.option("-o", "--output", "--out", "output", type=OutputFile(JSON), help="The JSON: results/encode/NAME.json")
def encode(
    config: Path | None, image: str | None, classes: int, patch: int, channels: int, blocks: int, layers: int,
    head_size: int, batch: int | None, presets: tuple[str, ...], passes: int, threads: int | None, device: str,
    compiled: bool, ray: bool, quick: bool, output: Path | None,
) -> None:  # fmt: skip
    """Encode with teachers of random weights: plain loop, ours, compiled, by precision; minutes in all.

    Images are random as well: neither changes the speed.
    """
    from benchmarks.encode.rows import Case
    from nfm.stages.trained.devices.machine import pick_device
    from nfm.stages.trained.training.section import blaming

    where: dict[str, Any] = {"device": pick_device(device), "threads": threads or os.cpu_count() or 1}
    if quick:
        where["probed"], passes = 0.0, 1
    if (config is not None and image is None) or (image is not None and presets):
        raise click.UsageError("give --image CxHxW with -c (a config has no shape), or --preset, or neither")
    if image is not None:
        sizes = {"patch": patch, "channels": channels, "blocks": blocks, "layers": layers, "head_size": head_size}
        sizes |= _teacher(config) if config else {}
        where |= {"image_shape": _shape(image), "classes": classes, "batch": batch or 64, **sizes}
        cases = [Case(name=config.stem if config else image, **where)]
    else:
        names = [name for name in PRESETS if name in (presets or PRESETS)]
        cases = [Case(name=name, **where | PRESETS[name] | ({"batch": batch} if batch else {})) for name in names]
    with blaming("benchmarks.encode"):
        body = measure(cases, passes, compiled, ray, quick)
    click.echo(as_text(body))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def measure(cases: Sequence[Case], passes: int, compiled: bool, ray: bool, quick: bool = False) -> dict[str, Any]:
    """All cases as JSON's types; shards end to end, and Ray, with the first case of the target's width, or the last."""
    import torch

    from benchmarks.encode import rows as bench_encode_rows
    from benchmarks.encode import shards
    from nfm.stages.trained.devices.machine import threads

    body: dict[str, Any] = {
        "command": command("benchmarks.encode"),
        "machine": machine() | {"device": _device(cases[0].device), "threads": cases[0].threads},
        "versions": versions("nfm-pairs", "torch", "numpy", "ray"),
        "passes": passes,
        "cases": {},
    }
    for case in cases:
        click.echo(f"measuring: {case.name}", err=True)
        with threads(case.threads):
            body["cases"][case.name] = bench_encode_rows.measure(case, passes, compiled)
        if compiled:
            torch.compiler.reset()
    for case in [case for case in cases if case.channels >= TARGET_WIDTH][:1] or cases[-1:]:
        click.echo(f"measuring: shards of {case.name}", err=True)
        row = next(row for row in body["cases"][case.name]["rows"] if row["name"] == "ours float32")
        with tempfile.TemporaryDirectory(prefix="nfm-bench-") as folder:
            shop = shards.Workshop(
                Path(folder), case, "float32", row["batch"], row["images_per_second"] * (0.02 if quick else 1)
            )
            body["shards"] = {"case": case.name, **shards.end_to_end(shop, min(passes, 5))}
            if ray:
                body["ray"] = {"case": case.name, **shards.ray_over_serial(shop, min(passes, 5))}
    return {**body, "targets": targets(body)}


def targets(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, and whether it was met."""
    lines = []
    for name, case in body["cases"].items():
        if case["sizes"]["channels"] >= TARGET_WIDTH:
            share = next(row for row in case["rows"] if row["name"] == case["fastest"])["of_best_matrix_rate"]
            lines.append(_target(f"{name}: share of the best matrix-product rate", TARGET, share))
    if "ray" in body:
        lines.append(_target("Ray over serial, equal threads", RAY_TARGET, body["ray"]["ray_over_serial"]))
    return lines


def as_text(body: Mapping[str, Any]) -> str:
    """The run for people: a table a case, its profile, shards, Ray, targets."""
    shown = (
        "name", "batch", "images_per_second", "gflops", "of_best_matrix_rate", "over_plain", "noise_rms_error",
        "compile_seconds",
    )  # fmt: skip
    parts = []
    for name, case in body["cases"].items():
        rates = ", ".join(f"{key} {rate['best']:,.0f}" for key, rate in case["matrix_gflops"].items())
        rows = [[row.get(key) for key in shown] for row in case["rows"] if "not_measured" not in row]
        profile = ", ".join(f"{kind} {share:.0%}" for kind, share in case["profile"]["share_of_time"].items())
        parts += [
            f"{name}: {case['gflop_per_image']:.3g} GFLOP an image; matrix products, best GFLOP/s: {rates}",
            aligned([key.replace("_", " ") for key in shown], rows),
            *(f"{row['name']}: {row['not_measured']}" for row in case["rows"] if "not_measured" in row),
            f"time of {case['profile']['of']}: {profile}",
            "",
        ]
    for name in ("shards", "ray"):
        if name in body:
            parts += [f"{name}: " + ", ".join(f"{key} {value}" for key, value in body[name].items()), ""]
    for line in body["targets"]:
        parts.append(f"{line['what']}: {line['measured']} of {line['target']}, {'met' if line['met'] else 'not met'}")
    return "\n".join(parts).rstrip()


def _target(what: str, target: float, measured: float) -> dict[str, Any]:
    return {"what": what, "target": target, "measured": measured, "met": measured >= target}


def _shape(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise click.BadParameter(f"{text!r}: channels, height and width, for instance 3x64x64", param_hint="--image")
    channels, height, width = (int(size) for size in text.split("x"))
    return channels, height, width


def _teacher(config: Path) -> dict[str, int]:
    """The sizes that a config's [teacher] section gives, and its defaults."""
    from nfm.stages.trained.teacher import TeacherConfig

    try:
        section = TeacherConfig.model_validate(tomllib.loads(config.read_text(encoding="utf-8")).get("teacher", {}))
    except ValueError as error:
        raise click.BadParameter(f"{config}: {error}", param_hint="-c") from error
    return {name: getattr(section, name) for name in ("patch", "channels", "blocks", "layers", "head_size")}


def _device(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"
