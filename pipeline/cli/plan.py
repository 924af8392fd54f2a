"""`nfm plan`: what a run would do and what it costs; for pairs also the time with any number of workers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from nfm.pipeline.cli.compare_options import compared_options, overrides_of
from nfm.pipeline.cli.options import MANY, Number, Whole, config_option, json_option, set_option
from nfm.pipeline.config import load
from nfm.pipeline.graph import STAGES
from nfm.stages.base import StageError

WORKERS = (1, 8, 64)


class ImageShape(click.ParamType):
    """CxHxW as three numbers."""

    name = "CxHxW"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5}){2}", str(value)):
            self.fail(f"{value!r}: channels, height and width, for instance 3x64x64", param, ctx)
        return tuple(int(size) for size in str(value).split("x"))


@click.command()
@click.argument("stage", type=click.Choice(list(STAGES)))
@config_option
@set_option
@compared_options
@click.option("--images", type=Whole(1, MANY), help="Training images, to plan pairs before the data is there.")
@click.option("--image-shape", type=ImageShape(), help="Their shape, with --images: 3x64x64.")
@click.option("--classes", type=Whole(0, MANY), help="Their classes, with --images; 0 for none. [default: 1000]")
@click.option("--workers", multiple=True, type=Whole(1, MANY), help="Time for so many. Repeatable. [default: 1, 8, 64]")
@click.option("--rate", type=Number(0, 1e12, above=True), help="Images a second of a worker elsewhere.")
@json_option
def plan(
    stage: str, config_path: Path, overrides: tuple[str, ...], couplings: list[str] | None, seeds: list[int] | None,
    images: int | None, image_shape: tuple[int, ...] | None, classes: int | None, workers: tuple[int, ...],
    rate: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Show what a run would do and what it costs, and do nothing.

    For pairs that are still to be made it also shows shards, bytes by codec, and time by number of workers: from this
    machine's rate, which takes seconds to measure, or from --rate. With --images and --image-shape it does not look at
    data.
    """
    from nfm.pipeline import builder, overview

    if stage != "pairs" and (images or image_shape or classes is not None or workers or rate):
        raise click.UsageError(f"--images, --image-shape, --classes, --workers and --rate plan pairs, not {stage}")
    if (images is None) != (image_shape is None) or (classes is not None and images is None):
        raise click.UsageError("give --images and --image-shape together (and --classes only with them)")
    config = load(config_path, (*overrides, *overrides_of(couplings, seeds, stage)))
    counts = workers or WORKERS
    if images and image_shape:
        facts = {"images": images, "image_shape": list(image_shape), "classes": 1000 if classes is None else classes}
        rows = [overview.pairs_to_come(config, facts, counts, rate)]
    else:
        nodes = builder.build(config, target=stage)
        try:
            rows = overview.plan(nodes, stage)
        except StageError as error:
            hint = f"{error}. Without the data, plan pairs with --images N --image-shape CxHxW"
            raise type(error)(hint if stage == "pairs" else str(error)) from error
        if stage == "pairs" and (rows[-1]["would"] != overview.DONE or workers or rate):
            rows[-1]["plan"] = overview.pairs_plan(nodes, counts, rate)
    click.echo(json.dumps(rows, indent=2) if as_json else overview.plan_text(rows))
