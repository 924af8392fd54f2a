"""`nfm plan`: what a run would do and what it costs; for pairs also the time with any number of workers."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import click

from nfm.pipeline.cli.compare_options import compared_options, overrides_of
from nfm.pipeline.cli.options import MANY, Number, Whole, config_option, json_option, set_option
from nfm.pipeline.config import Override, load
from nfm.pipeline.graph import STAGES


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
@click.option("--images", type=Whole(1, MANY), help="Training images, to plan before the data is there.")
@click.option("--image-shape", type=ImageShape(), help="Their shape, with --images: 3x64x64.")
@click.option(
    "--classes", type=Whole(0, MANY), help="Their classes, with --images; 0 for none. [default: 1000, at most --images]"
)
@click.option(
    "--workers",
    multiple=True,
    type=Whole(1, MANY),
    help="Of training, how many share it. Of pairs, the time that so many take. Repeatable. [default: 1, 8, 64]",
)
@click.option("--memory", type=Number(0, 1e6, above=True), help="Of training, the GB of a device that it should fit.")
@click.option(
    "--rate", type=Number(0, 1e12, above=True), help="Images or pairs of STAGE a second, of one worker elsewhere."
)
@json_option
def plan(
    stage: str, config_path: Path, overrides: tuple[str, ...], couplings: list[str] | None, seeds: list[int] | None,
    images: int | None, image_shape: tuple[int, ...] | None, classes: int | None, workers: tuple[int, ...],
    memory: float | None, rate: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Show what a run would do and what it costs, and do nothing.

    Times are of this machine, which is timed for seconds, or follow from --rate. With --images and --image-shape no
    data is looked at. Of pairs also shards, bytes by codec and time by workers; of compare the sums by kind of stage.
    """
    from nfm.pipeline import builder
    from nfm.pipeline.overview.plan import TRAINED, Asked, data_to_come, plan_text
    from nfm.pipeline.overview.plan import plan as planned

    if (images is None) != (image_shape is None) or (classes is not None and images is None):
        raise click.UsageError("give --images and --image-shape together (and --classes only with them)")
    if stage in TRAINED and len(workers) > 1:
        raise click.UsageError(f"--workers of {stage}: give it once, as {stage}.workers in the config")
    if stage in TRAINED and workers:
        overrides, workers = (*overrides, Override(f"{stage}.workers={workers[0]}", f"--workers {workers[0]}")), ()
    config = load(config_path, (*overrides, *overrides_of(couplings, seeds, stage)))
    data = None
    if images is not None and image_shape is not None:
        data = data_to_come(config, images, image_shape, min(1000, images) if classes is None else classes)
    rows = planned(
        builder.build(config, target=stage),
        stage,
        Asked(data, workers, rate, memory),
        say=partial(click.echo, err=True),
    )
    click.echo(json.dumps(rows, indent=2) if as_json else plan_text(rows, stage))
