"""`python -m benchmarks.train`: images/s of training beside the peers' own loops, and the share of the matrix rate."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.told import command, machine, versions
from nfm.pipeline.cli.options import LocalPath, Number, OutputFile
from nfm.stages.display.endings import JSON
from nfm.stages.display.tables import aligned

if TYPE_CHECKING:
    from benchmarks.train.cases import Case
    from benchmarks.turns import Peer

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
TARGET = 1.0  # of each peer
GPU_TARGET = 0.45  # of the matrix rate in bfloat16, at the paper's sizes


@click.command()
@click.option("--tarflow", type=LocalPath(exists=True, file_okay=False), help="A checkout of apple/ml-tarflow.")
@click.option("--sit", type=LocalPath(exists=True, file_okay=False), help="A checkout of willisma/SiT.")
@click.option("--sizes", default="cpu", show_default=True, type=click.Choice(["tiny", "cpu", "paper"]))
@click.option("--only", multiple=True, help="Only cases whose names have this in them. Repeatable.")
@click.option("--batch", type=click.IntRange(min=1), help="Of every case. [default: the case's own]")
@click.option(
    "--precision", type=click.Choice(["float32", "bfloat16"]), help="[default: bfloat16 on a GPU, else float32]"
)
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=1), help="Medians are taken of these.")
@click.option("--seconds", default=1.0, show_default=True, type=Number(0, 600, above=True), help="Of a round of each.")
@click.option(
    "--clock", default="wall", show_default=True, type=click.Choice(list(CLOCKS)),
    help="processor: the time that this process had, for a machine that others use, best with --threads 1.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="Of the CPU. [default: all cores]")
@click.option("--device", default="auto", show_default=True)
@click.option("--compile/--no-compile", "compiled", default=False, show_default=True, help="Both, as each does it.")
@click.option("-o", "--output", "--out", "output", type=OutputFile(JSON), help="The JSON: results/train/NAME.json")
def train(
    tarflow: Path | None, sit: Path | None, sizes: str, only: tuple[str, ...], batch: int | None,
    precision: str | None, rounds: int, seconds: float, clock: str, threads: int | None, device: str, compiled: bool,
    output: Path | None,
) -> None:  # fmt: skip
    """Train teachers and students of random weights on random images, in turns with the peers' own loops.

    Without checkouts of the peers only ours are measured.
    """
    from benchmarks.train.cases import SIZES
    from nfm.stages.trained.devices.machine import pick_device

    device = pick_device(device)
    precision = precision or ("bfloat16" if device.startswith("cuda") else "float32")
    changed = {"precision": precision, "device": device, **({"batch_size": batch} if batch else {})}
    cases = [_changed(case, changed) for case in SIZES[sizes] if not only or any(part in case.name for part in only)]
    if not cases:
        raise click.BadParameter(
            f"no case has it; there are {', '.join(c.name for c in SIZES[sizes])}", param_hint="--only"
        )
    if clock == "processor" and device.startswith("cuda"):
        raise click.UsageError(f"--clock processor is of a CPU, and --device is {device}: leave one of them out")
    threads = threads or os.cpu_count() or 1
    body = measure(cases, {"tarflow": tarflow, "sit": sit}, rounds, seconds, threads, compiled, CLOCKS[clock])
    click.echo(as_text(body))
    if output is not None:
        output.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def _changed(case: Case, fields: Mapping[str, Any]) -> Case:
    from dataclasses import replace

    return replace(case, config=case.config.model_copy(update=dict(fields)))


def measure(
    cases: list[Case], checkouts: Mapping[str, Path | None], rounds: int, seconds: float, threads: int, compiled: bool,
    clock: Callable[[], float],
) -> dict[str, Any]:  # fmt: skip
    """All cases as JSON's types."""
    import torch

    from benchmarks.train import rows
    from benchmarks.train.checkouts import commit
    from nfm.stages.trained.devices.machine import free_memory, is_out_of_memory
    from nfm.stages.trained.devices.machine import threads as computing_with

    device = cases[0].config.device
    on_gpu = device.startswith("cuda")
    torch.backends.cuda.matmul.allow_tf32 = False  # both losses are compared in float32
    body: dict[str, Any] = {
        "command": command("benchmarks.train"),
        "machine": machine() | {"device": torch.cuda.get_device_name(device) if on_gpu else "cpu", "threads": threads},
        "versions": versions("nfm-pairs", "torch", "numpy", "timm"),
        "peers": {name: commit(folder) if folder else "not given" for name, folder in checkouts.items()},
        "rounds": rounds,
        "clock": next(name for name, known in CLOCKS.items() if known is clock),
        "compiled": compiled,
        "cases": {},
    }
    for case in cases:
        click.echo(f"measuring: {case.name}", err=True)
        peer = _peer(case, checkouts, device, compiled)
        try:
            with computing_with(threads):
                row = rows.measure(case, peer, rounds, seconds, device, compiled, clock)
        except Exception as error:  # the others keep their figures
            if not (compiled or is_out_of_memory(error)):
                raise
            row = {"not_measured": _reason(error)}
        body["cases"][case.name] = {"batch": case.config.batch_size, "precision": case.config.precision, **row}
        if compiled:
            torch.compiler.reset()
        free_memory(device)
    return {**body, "targets": targets(body)}


def _reason(error: Exception) -> str:
    """In one line, with the remedy where memory was short."""
    from nfm.stages.trained.devices.machine import is_out_of_memory

    if is_out_of_memory(error):
        return "the device has too little memory for both: give a smaller --batch"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"


def _peer(case: Case, checkouts: Mapping[str, Path | None], device: str, compiled: bool) -> Callable[[], Peer] | None:
    from benchmarks.train.sit import Sit
    from benchmarks.train.tarflow import Tarflow
    from nfm.stages.trained.teacher import TeacherConfig

    kind: type[Tarflow] | type[Sit] = Tarflow if isinstance(case.config, TeacherConfig) else Sit
    folder = checkouts["tarflow" if kind is Tarflow else "sit"]
    return partial(kind, folder, case, device, compiled) if folder else None


def targets(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, and whether it was met."""
    lines = []
    for name, row in body["cases"].items():
        if "ours_over_theirs" in row:
            lines.append(_target(f"{name}: ours over theirs", TARGET, row["ours_over_theirs"]))
        if body["machine"]["device"] != "cpu" and row["precision"] == "bfloat16" and "ours" in row:
            lines.append(_target(f"{name}: share of the matrix rate", GPU_TARGET, row["ours"]["of_matrix_rate"]))
    return lines


def _target(what: str, target: float, measured: float) -> dict[str, Any]:
    return {"what": what, "target": target, "measured": measured, "met": measured >= target}


def as_text(body: Mapping[str, Any]) -> str:
    """The run for people: a table, and the targets."""
    head = ["", "batch", "precision", "ours images/s", "of matrix rate", "theirs images/s", "of matrix rate",
            "ours / theirs", "lowest", "highest"]  # fmt: skip
    lines = []
    for name, row in body["cases"].items():
        if "not_measured" in row:
            continue
        cells = [name, row["batch"], row["precision"], *row["ours"].values()]
        if row["theirs"] == "not given":
            lines.append([*cells, "not given", None, None, None, None])
        else:
            ratios = [row[key] for key in ("ours_over_theirs", "lowest", "highest")]
            lines.append([*cells, *row["theirs"].values(), *ratios])
    parts = [aligned(head, lines), ""]
    parts += [f"{name}: {row['not_measured']}" for name, row in body["cases"].items() if "not_measured" in row]
    for line in body["targets"]:
        parts.append(f"{line['what']}: {line['measured']} of {line['target']}, {'met' if line['met'] else 'not met'}")
    return "\n".join(parts).rstrip()
