"""The `nfm` command. Exit codes: 0 done, 1 findings or failed work, 2 wrong use, 130 stopped by the user."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nfm.pipeline.artifacts.artifact import Artifact, artifacts_root, find
from nfm.pipeline.cli import exits
from nfm.pipeline.cli.compare import compare
from nfm.pipeline.cli.compare_options import compared_options, overrides_of
from nfm.pipeline.cli.gc import gc
from nfm.pipeline.cli.options import (
    LOCAL_PATH,
    MANY,
    PLACE,
    SEED,
    MovingAverage,
    Number,
    Whole,
    at_once_option,
    check_of_solvers,
    check_of_student,
    config_option,
    given_guidance,
    guidance_options,
    is_given,
    json_option,
    level_options,
    picture_option,
    run_custom_option,
    set_option,
)
from nfm.pipeline.cli.pairs import pairs
from nfm.pipeline.cli.plan import plan
from nfm.pipeline.cli.submit import submit
from nfm.pipeline.cli.teacher import teacher
from nfm.pipeline.cli.worklist import encode, work, worklist, worklist_of_pairs
from nfm.pipeline.config import Override, load
from nfm.stages.base import Unfit
from nfm.stages.couplings.custom import Allowed
from nfm.stages.trained.sampling import DIFFUSIONS, GRIDS, MOST_NFE, SOLVERS, check_diffusion
from nfm.stages.trained.training.section import blaming
from nfm.storage.files.paths import exists
from nfm.storage.ledger.standing import again

if TYPE_CHECKING:
    from nfm.pipeline.upkeep.audit import Level

STAGE_NAMES = [
    *("data", "latents", "features", "teacher", "potential", "pairs", "student", "evaluate", "report", "compare")
]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """Make, audit and stream the pairs of noise and image that flow-matching students train on."""


@cli.command()
@click.argument("stage", type=click.Choice(STAGE_NAMES))
@config_option
@set_option
@compared_options
@click.option(
    "--ray-address",
    metavar="ADDRESS",
    help="The Ray cluster of all stages, as --set pairs.ray_address; or RAY_ADDRESS.",
)
@at_once_option
def run(
    stage: str, config_path: Path, overrides: tuple[str, ...], couplings: list[str] | None, seeds: list[int] | None,
    ray_address: str | None, at_once: int,
) -> None:  # fmt: skip
    """Run a stage and everything that it needs and that is missing."""
    from nfm.pipeline import builder, runner
    from nfm.pipeline.runner import side_by_side

    overrides += overrides_of(couplings, seeds, stage)
    if ray_address is not None:
        told = f"--ray-address {ray_address}"
        sections = ("latents", "pairs", "teacher", "student", "features")
        overrides += tuple(Override(f"{section}.ray_address={ray_address}", told) for section in sections)
    config = load(config_path, overrides)
    nodes = builder.build(config, target=stage)
    artifact = runner.run(nodes, stage, beside=side_by_side.of(config, stage, at_once))
    click.echo(_main_output(artifact))


@cli.command(hidden=True)
@click.argument("name")
def one_stage(name: str) -> None:
    """Make one stage of a run, which `--at-once` hands over on standard input; NAME is for who looks at processes."""
    from nfm.pipeline.runner import side_by_side

    side_by_side.make(sys.stdin.buffer)


@cli.command()
@click.argument("stage", type=click.Choice(STAGE_NAMES), required=False)
@config_option
@set_option
@compared_options
@json_option
def status(
    stage: str | None, config_path: Path, overrides: tuple[str, ...], couplings: list[str] | None,
    seeds: list[int] | None, as_json: bool,
) -> None:  # fmt: skip
    """Show one line for each stage: state, fingerprint, size, main figures. With STAGE, of it and what it needs."""
    from nfm.pipeline import builder, overview

    config = load(config_path, (*overrides, *overrides_of(couplings, seeds, stage or "compare")))
    rows = overview.status(builder.build(config, target=stage or ""), stage)
    click.echo(json.dumps(rows, indent=2) if as_json else overview.as_text(rows))


@cli.command()
@click.argument("artifact", required=False, type=PLACE)
@click.option(
    "-c", "--config", "config_path", type=LOCAL_PATH, metavar="F",
    help="Audit what this config's furthest stage was made of.",
)  # fmt: skip
@set_option
@level_options(
    "Fingerprints, digests of manifests, sizes.", "Also encode a seeded sample of pairs again and decode it."
)
@click.option(
    "--sample",
    default=300,
    type=Whole(1, MANY),
    show_default=True,
    help="Pairs of each store that --deep takes.",
)
@run_custom_option(
    "--deep may run the custom function whose file has this digest. Repeatable. With -c also those of the config."
)
@json_option
def audit(
    artifact: Path | None, config_path: Path | None, overrides: tuple[str, ...], level: Level, sample: int,
    digests: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Check that artifacts are what their manifests say, back to the data; exit 1 on any finding."""
    from nfm.pipeline.upkeep import audit as auditing

    if (artifact is None) == (config_path is None):
        raise click.UsageError("name an artifact or give -c CONFIG, one of the two")
    if level != "deep" and is_given("sample"):
        raise click.UsageError("--sample is of --deep: give that too, or leave it out")
    if level != "deep" and digests:
        raise click.UsageError("--run-custom is of --deep, which alone runs code: give that too, or leave it out")
    targets, own = [find(artifact)] if artifact is not None else [], frozenset[str]()
    if config_path is not None:
        config = load(config_path, overrides)
        targets, own = auditing.finished(config), auditing.own_code(config)
    allowed = Allowed(own | frozenset(digests), lambda text: click.echo(text, err=True))
    results = auditing.audit(targets, level, sample, allowed)
    click.echo(json.dumps([asdict(result) for result in results], indent=2) if as_json else auditing.as_text(results))
    if any(result.findings for result in results):
        sys.exit(1)


@cli.command()
@click.argument("artifact", type=PLACE)
@json_option
def lineage(artifact: Path, as_json: bool) -> None:
    """Show what an artifact was made from, back to the data."""
    from nfm.pipeline.artifacts import lineage as lines

    found = find(artifact)
    click.echo(json.dumps(lines.as_json(found), indent=2) if as_json else "\n".join(lines.tree(found)))


@cli.command()
@click.option(
    "--pairs",
    "store",
    required=True,
    type=PLACE,
    metavar="STORE",
    help="The pair store: its folder, its URL or a manifest in it.",
)
@config_option
@set_option
def student(store: Path, config_path: Path, overrides: tuple[str, ...]) -> None:
    """Train only a student, from any store."""
    from nfm.pipeline import builder, runner

    artifact = runner.run(builder.build(load(config_path, overrides), store=find(store)), "student")
    click.echo(_main_output(artifact))


@cli.command("ls")
@json_option
def list_artifacts(as_json: bool) -> None:
    """List every artifact: stage, state, size, age, and what depends on it."""
    from nfm.pipeline import overview

    rows = overview.inventory()
    empty = f"no artifacts under {artifacts_root()}"
    click.echo(json.dumps(rows, indent=2) if as_json else overview.as_text(rows) if rows else empty)


@cli.command()
@click.argument("artifact", type=PLACE)
@click.option("-n", "count", default=64, type=Whole(1, 65_536), show_default=True, help="Number of images.")
@click.option(
    "--nfe",
    default=7,
    type=Whole(1, MOST_NFE),
    show_default=True,
    help="Evaluations of a student; a teacher is inverted.",
)
@click.option("--solver", default="auto", type=click.Choice(SOLVERS), show_default=True, help="auto: Euler to NFE 5.")
@click.option("--grid", default="square", type=click.Choice(GRIDS), show_default=True, help="Times: t = u^2 or t = u.")
@click.option(
    "--guidance",
    default=0.0,
    type=Number(-100, 100),
    show_default=True,
    help="v + g (v - v without labels); a teacher's own.",
)
@guidance_options
@click.option(
    "--diffusion",
    default="sigma",
    type=click.Choice(DIFFUSIONS),
    show_default=True,
    help="Noise of the SDE solvers.",
)
@click.option("--ema", type=MovingAverage(), metavar="NAME", help="Of a student: the moving average of this name.")
@click.option("--seed", default=0, type=SEED, show_default=True, help="Of the noise.")
@run_custom_option("The code of a model that is its user's own may run: of the file with this digest. Repeatable.")
@click.option("--latents", "as_latents", is_flag=True, help="Of a model of latents: draw these, in false colours.")
@picture_option("grid.png")
def sample(
    artifact: Path, count: int, nfe: int, solver: str, grid: str, guidance: float, diffusion: str,
    ema: str | None, seed: int, output: Path, digests: tuple[str, ...], as_latents: bool, **guided: Any,
) -> None:  # fmt: skip
    """Draw a grid of images from a student or teacher; its latents are decoded by the VAE that made them."""
    from nfm.stages.trained.sampling import sample_grid

    found = find(artifact)
    found.manifest()  # an unfinished artifact has none, and says so
    stage = found.spec.get("stage", "pairs")
    folder, latents = found.readable, None
    if stage in ("student", "teacher"):
        latents = _decoder_of(found, as_latents)
        _check_allowed(folder, stage, digests, latents)
    check_of_student(stage, "nfe", "solver", "grid", "ema", "diffusion")
    if stage == "student":
        check_of_solvers(folder, "nfe", "solver", "grid", "diffusion")
    options = given_guidance(stage, guidance, guided)
    if is_given("diffusion"):
        with blaming("--diffusion"):
            check_diffusion(solver, diffusion)
    sample_grid(folder, stage, count, nfe, seed, output, solver, grid, guidance, options, ema, diffusion, latents)
    click.echo(str(output))


@cli.command()
@click.argument("artifact", type=PLACE)
def repair(artifact: Path) -> None:
    """Move the bad shards of a store aside, so that whoever made it makes them again."""
    from nfm.pipeline.upkeep.repair import repair_store

    found = find(artifact)
    moved = repair_store(found)
    said = (
        f"set aside: {len(moved)}, with the generations that list them, which cannot be opened any more. To have a "
        f"complete store, {again(found.path)}"
    )
    click.echo("\n".join([*moved, said if moved else "nothing to repair"]))


cli.add_command(compare)
cli.add_command(gc)
cli.add_command(pairs)
cli.add_command(plan)
cli.add_command(submit)
cli.add_command(teacher)
cli.add_command(worklist)
cli.add_command(work)
pairs.add_command(worklist_of_pairs)
pairs.add_command(encode)


def _decoder_of(model: Artifact, as_latents: bool) -> Path | None:
    """The latents that a model was trained on, whose VAE decodes its samples; None if it was trained on data."""
    from nfm.pipeline.artifacts.lineage import ancestors
    from nfm.stages.data.latents.stage import NAME
    from nfm.stages.trained.sampling import image_dtype_of

    found = next((one for one in ancestors(model) if one.done and one.spec.get("stage") == NAME), None)
    if as_latents and image_dtype_of(model.readable) == "uint8":
        raise Unfit(f"--latents: {model.name} was trained on pixels; leave it out")
    return None if found is None or as_latents else found.readable


def _check_allowed(folder: Path, stage: str, digests: tuple[str, ...], latents: Path | None) -> None:
    """Raises Unfit where sampling would run code that its user has not allowed; says whose code runs."""
    from nfm.stages.couplings import custom
    from nfm.stages.trained.foreign import own, vae

    code = own.recorded(folder, stage) | ({} if latents is None else vae.recorded(latents))
    for field, (function, sha256) in code.items():
        if sha256 not in digests:
            raise Unfit(
                f"{folder}: {field} = {function!r} is code, and may have been sent with the artifact: "
                f"when you know the file of SHA-256 {sha256}, give --run-custom with it"
                f"{custom.changed(function, sha256, field)}"
            )
    own.announce_code(code, lambda text: click.echo(text, err=True))


def _main_output(artifact: Artifact) -> str:
    shown = [artifact.path / name for name in ("report.html", "compare.txt")]
    return str(next((path for path in shown if exists(path)), artifact.reference))


def main() -> None:
    """Entry point of the installed script."""
    exits.run(cli)
