"""`python -m benchmarks.accelerator`: what an accelerator gives, in pieces of minutes; a later call goes on."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.accelerator.job import Job, Unfinished
from benchmarks.accelerator.kept import Kept, alone
from benchmarks.accelerator.sizes import PLANS, Plan

LONGEST = 9 * 60.0  # seconds of a piece
WORK = "build/accelerator"


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
    """What to call, and what must be done before. `least` is the time in seconds with which it is begun.

    `files` are what it leaves in the folder of the work: folders, and .safetensors of these names.
    """

    module: str
    function: str
    after: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
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
    "teacher": Piece("trial", "teacher", files=("teacher",)),
    "pairs": Piece("trial", "pairs", after=("teacher",), files=("pairs",)),
    "student-independent": Piece(
        "trial", "student", files=("student-independent",), options={"coupling": "independent"}
    ),
    "student-nfm": Piece("trial", "student", after=("pairs",), files=("student-nfm",), options={"coupling": "nfm"}),
    "table": Piece("trial", "table", after=("student-independent", "student-nfm"), files=("features",)),
}


@click.command()
@click.option(
    "--minutes",
    default=30.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Of this call, about.",
)
@click.option("--only", multiple=True, type=click.Choice(list(PIECES)),
              help="Only this piece, measured again with what is made from it. Repeatable.")  # fmt: skip
@click.option("--images", type=Local(".npz"), help="The trial's images: an .npz with data, uint8 [N, 1, 28, 28], and "
              "labels from 0 to 9. [default: drawn flowers]")  # fmt: skip
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
    if images is not None:
        _check_images(images, plan)
    with alone(work):
        kept = Kept(work, plan.name, _card(device), images, output)
        begun, waiting = 0, []
        for name in PIECES:
            if only and name not in only:
                continue
            if not only and kept.is_done(name):
                click.echo(f"{name}: done before", err=True)
                continue
            if why := _not_now(name, kept, end - time.monotonic(), plan):
                click.echo(why, err=True)
                waiting.append(why)
                continue
            begun += 1
            _begin_anew(name, kept)
            began = time.monotonic()
            row = _row(PIECES[name], Job(plan, device, work, min(end, began + LONGEST), kept.pieces, images))
            kept.add(name, row | {"seconds": round(time.monotonic() - began, 1)})
            click.echo(f"{name}: {json.dumps(kept.pieces[name])}", err=True)
        if kept.pieces:
            kept.save()
            click.echo(kept.state["output"])
    left_over = [name for name in PIECES if not kept.is_done(name)]
    if left_over:
        click.echo(f"left: {', '.join(left_over)}; the same command without --only goes on", err=True)
    if any("failed" in kept.pieces.get(name, {}) for name in left_over):
        raise SystemExit(1)
    if not begun and waiting:
        raise click.UsageError(f"nothing was begun: {'; '.join(waiting)}")
    if not begun:
        click.echo("nothing was left to measure: these are the figures of earlier calls; --only PIECE, or another "
                   "--work, measures anew", err=True)  # fmt: skip


def _not_now(name: str, kept: Kept, seconds_left: float, plan: Plan) -> str:
    """Why a piece cannot be begun; empty if it can."""
    piece = PIECES[name]
    if lacking := [before for before in piece.after if not kept.is_done(before)]:
        return f"{name}: needs {', '.join(lacking)} first"
    if seconds_left < (0 if plan.name == "tiny" else piece.least):
        return f"{name}: {max(0, seconds_left):.0f} s are left, too few to begin it (--minutes)"
    return ""


def _begin_anew(name: str, kept: Kept) -> None:
    """Forgets what is measured now, if it was done, and what was made from that; half done, it goes on."""
    if not kept.is_done(name):
        return
    old = [name]
    for other, piece in PIECES.items():
        if set(piece.after) & set(old):
            old.append(other)
    gone = [other for other in old[1:] if other in kept.pieces]
    if gone:
        click.echo(f"{name}: made again, so {', '.join(gone)} of the one before are left to be made again", err=True)
    kept.forget(old, (file for other in old for file in PIECES[other].files))


def _check_images(images: Path, plan: Plan) -> None:
    from benchmarks.accelerator.trial import trial_images

    if not images.is_file():
        raise click.BadParameter(f"{images}: no such file", param_hint="--images")
    try:
        trial_images(plan, images)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--images") from error


def _row(piece: Piece, job: Job) -> dict[str, Any]:
    """What a piece found, or how far it came."""
    from nfm.stages.trained.devices.machine import free_memory

    try:
        return piece(job)
    except KeyboardInterrupt:
        click.echo("stopped; the same command without --only goes on from here", err=True)
        raise SystemExit(130) from None
    except Unfinished as error:
        return {"unfinished": str(error)}
    except Exception as error:  # the others keep their figures
        return {"failed": f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:500]}"}
    finally:
        free_memory(job.device)


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
