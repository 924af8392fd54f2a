"""`python -m benchmarks.accelerator`: what an accelerator gives, in pieces of minutes; a later call goes on."""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.accelerator.job import Job, Unfinished
from benchmarks.accelerator.sizes import PLANS
from benchmarks.told import machine, versions

LONGEST = 9 * 60.0  # seconds of a piece
RESULTS = Path("results/gpu")
WORK, STATE = "build/accelerator", "state.json"


class Local(click.ParamType):
    """A path of this machine. The rule of the `nfm` command for places needs the packages that may be missing here."""

    name = "path"

    def __init__(self, ending: str = "") -> None:
        self.ending = ending

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if re.match(r"[A-Za-z][\w+.-]+:/", str(value)):
            self.fail(f"{value}: a URL, and a path of this machine is needed", param, ctx)
        path = Path(value)
        if not path.name.endswith(self.ending):
            self.fail(f"{value}: its ending is {path.suffix or 'none'}, and this is {self.ending}", param, ctx)
        return path


class Piece(NamedTuple):
    """What to call, and what must be done before. `least` is the time in seconds with which it is begun."""

    module: str
    function: str
    after: tuple[str, ...] = ()
    least: float = 60.0
    options: Mapping[str, Any] = {}

    def __call__(self, job: Job) -> dict[str, Any]:
        found: Callable[..., dict[str, Any]] = getattr(
            __import__(f"benchmarks.accelerator.{self.module}", fromlist=[self.function]), self.function
        )
        return functools.partial(found, **self.options)(job)


PIECES: dict[str, Piece] = {
    "matrices": Piece("rates", "matrices"),
    "tests": Piece("tests", "tests"),
    "encode": Piece("rates", "encode", least=120),
    "train": Piece("rates", "train", least=120),
    "sample": Piece("rates", "sample", least=120),
    "reader": Piece("reader", "reader", least=120),
    "teacher": Piece("trial", "teacher"),
    "pairs": Piece("trial", "pairs", after=("teacher",)),
    "student-independent": Piece("trial", "student", options={"coupling": "independent"}),
    "student-nfm": Piece("trial", "student", after=("pairs",), options={"coupling": "nfm"}),
    "table": Piece("trial", "table", after=("student-independent", "student-nfm")),
}


@click.command()
@click.option(
    "--minutes",
    default=30.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Of this call, about.",
)
@click.option("--only", multiple=True, type=click.Choice(list(PIECES)), help="Only this piece, again. Repeatable.")
@click.option("--images", type=Local(), help="The trial's images: an .npz with data, uint8 [N, 1, 28, 28], and labels "
              "from 0 to 9. [default: drawn flowers]")  # fmt: skip
@click.option("--tiny", is_flag=True, help="A small run that shows that all works; its figures mean nothing.")
@click.option("--device", default="auto", show_default=True)
@click.option("--work", default=WORK, show_default=True, type=Local(),
              help="Keeps what is done and half done, for the next call. Remove it to begin anew.")  # fmt: skip
@click.option("-o", "--output", "--out", "output", type=Local(".json"),
              help="The JSON. [default: results/gpu/CARD-DATE.json]")  # fmt: skip
def accelerator(
    minutes: float, only: tuple[str, ...], images: Path | None, tiny: bool, device: str, work: Path,
    output: Path | None,
) -> None:  # fmt: skip
    """Run what is not done yet, a piece of at most 9 minutes after the other; the JSON is written after each."""
    from nfm.trainers.training.products import forbid_tf32

    end, plan = time.monotonic() + 60 * minutes, PLANS["tiny" if tiny else "full"]
    device = _device(device)
    forbid_tf32()
    if images is not None and not images.is_file():
        raise click.BadParameter(f"{images}: no such file", param_hint="--images")
    state = _begun(work, plan.name, device, output)
    for name in only:
        state["pieces"].pop(name, None)
    for name in only or PIECES:
        piece = PIECES[name]
        if _is_done(state, name):
            click.echo(f"{name}: done before", err=True)
            continue
        if lacking := [before for before in piece.after if not _is_done(state, before)]:
            click.echo(f"{name}: needs {', '.join(lacking)} first", err=True)
            continue
        if end - time.monotonic() < (0 if tiny else piece.least):
            click.echo(f"{name}: {max(0, end - time.monotonic()):.0f} s are left, too few to begin it", err=True)
            continue
        work.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        job = Job(plan, device, work, min(end, began + LONGEST), state["pieces"], images)
        try:
            row = _row(piece, job)
        except KeyboardInterrupt:
            click.echo("stopped; the same command goes on from here", err=True)
            raise SystemExit(130) from None
        state["pieces"][name] = row | {"seconds": round(time.monotonic() - began, 1)}
        _write(work / STATE, state)
        _write(Path(state["output"]), {key: value for key, value in state.items() if key != "output"})
        click.echo(f"{name}: {json.dumps(state['pieces'][name])}", err=True)
    click.echo(state["output"])
    left = [name for name in PIECES if not _is_done(state, name)]
    if left:
        click.echo(f"left: {', '.join(left)}; the same command goes on", err=True)
    if any("failed" in state["pieces"].get(name, {}) for name in left):
        raise SystemExit(1)


def _row(piece: Piece, job: Job) -> dict[str, Any]:
    """What a piece found, or how far it came."""
    from nfm.stages.trained.devices.machine import free_memory

    try:
        return piece(job)
    except Unfinished as error:
        return {"unfinished": str(error)}
    except Exception as error:  # the others keep their figures
        return {"failed": f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:500]}"}
    finally:
        free_memory(job.device)


def _is_done(state: Mapping[str, Any], name: str) -> bool:
    found = state["pieces"].get(name)
    return found is not None and not {"unfinished", "failed"} & found.keys()


def _begun(work: Path, plan: str, device: str, output: Path | None) -> dict[str, Any]:
    """The state of an earlier call in this folder, or a new one. Work of another device or size is refused."""
    card = _card(device)
    if (work / STATE).exists():
        state: dict[str, Any] = json.loads((work / STATE).read_text(encoding="utf-8"))
        if (state["plan"], state["card"]) != (plan, card):
            raise click.UsageError(
                f"{work}: holds the {state['plan']} run of {state['card']}, and this is the {plan} one of {card}: "
                "give another --work, or remove it"
            )
        return state | ({"output": str(output)} if output else {})
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return {
        "output": str(output or RESULTS / f"{slug}-{day}.json"), "plan": plan, "card": card, "machine": machine(),
        "versions": versions("nfm-pairs", "torch", "numpy"), "command": "python -m benchmarks.accelerator",
        "pieces": {},
    }  # fmt: skip


def _device(name: str) -> str:
    """`auto` is CUDA if this machine has it."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not (re.fullmatch(r"cuda(:\d)?", name) and torch.cuda.is_available()):
        raise click.BadParameter(f"{name!r} is not here; there is cpu", param_hint="--device")
    return name


def _card(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def _write(path: Path, body: Mapping[str, Any]) -> None:
    """All of a file or nothing, so that a call that is killed leaves the state before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)
