"""`nfm worklist` and `nfm work`: the two halves of making pairs, data or latents in an array of independent tasks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nfm.pipeline.cli.options import MANY, FileOrUrl, Whole, config_option, set_option

if TYPE_CHECKING:
    from nfm.pipeline.graph import Node
    from nfm.stages.executors.slurm import Pieces, Worklist

IN_PIECES = ("data", "latents", "pairs")  # stages whose work tasks of an array can share
_output = click.option(
    "-o", "--output", required=True, type=FileOrUrl(output=True), help="Where it goes, a file or a URL."
)
_file = click.argument("file", type=FileOrUrl())
_task = click.option("--task", required=True, type=Whole(0, MANY), help="Which task this is, from 0.")
_of = click.option("--of", required=True, type=Whole(1, MANY), help="How many tasks share the list.")


@click.command("worklist")
@click.argument("stage", type=click.Choice(IN_PIECES))
@config_option
@set_option
@_output
def worklist(stage: str, config_path: Path, overrides: tuple[str, ...], output: Path) -> None:
    """Write the fixed, numbered list of what is missing of a STAGE, for the tasks of an array.

    Makes the inputs of the stage if they are missing. A list is never changed: an existing file is kept if it has all
    that is pending, and refused if not.
    """
    _write(stage, config_path, overrides, output)


@click.command("worklist")
@config_option
@set_option
@_output
def worklist_of_pairs(config_path: Path, overrides: tuple[str, ...], output: Path) -> None:
    """Write the fixed, numbered list of missing shards of a store: `nfm worklist pairs`."""
    _write("pairs", config_path, overrides, output)


@click.command()
@_file
@_task
@_of
def work(file: Path, task: int, of: int) -> None:
    """Do what belongs to one task of a worklist: the pieces whose number mod --of is --task.

    Exit 0 when all of them are committed, 1 when some failed three times, 130 when stopped: SIGTERM and SIGINT drop the
    current piece, SIGUSR1 finishes it. The same command continues with the remaining pieces.
    """
    _do(file, task, of)


@click.command()
@_file
@_task
@_of
def encode(file: Path, task: int, of: int) -> None:
    """Encode the shards of a worklist that belong to one task: `nfm work`."""
    _do(file, task, of)


def _write(stage: str, config_path: Path, overrides: tuple[str, ...], output: Path) -> None:
    from nfm.pipeline import builder, prechecks, runner
    from nfm.pipeline.config import load
    from nfm.pipeline.graph import upstream
    from nfm.stages.executors import slurm

    config = load(config_path, overrides)
    nodes = builder.build(config, target=stage)
    node = upstream(nodes, stage)[-1]
    prechecks.check(nodes, node.name)
    for needed in node.inputs.values():
        runner.run(nodes, needed.name)
    listed = _listed(node)
    found, made = slurm.freeze(listed, output.absolute()), "encoded" if stage == "pairs" else "made"
    click.echo(f"{output}: {len(found.shards):,} shards of {listed.store} are to be {made}")


def _do(file: Path, task: int, of: int) -> None:
    from nfm.pipeline import runner
    from nfm.pipeline.artifacts.artifact import Artifact
    from nfm.pipeline.console import StopRequest
    from nfm.stages.base import Stopped
    from nfm.stages.display.units import clock
    from nfm.stages.executors import slurm
    from nfm.storage.files.paths import as_path

    if task >= of:
        raise click.UsageError(f"--task {task} --of {of}: tasks count from 0 to {of - 1}")
    stop = StopRequest()
    with stop.listening():
        found = slurm.load(file)
        console = runner.console_of(found.stage, Artifact(as_path(found.store)), stop)
        started = time.time()
        console.log("START", worklist=str(file), task=task, of=of, versions=runner.versions())
        try:
            metrics = slurm.make_share(found, _pieces_of(found.stage), task, of, console)
        except (Stopped, KeyboardInterrupt):
            console.log("STOP", task=task)
            console.say("stopped; the same task goes on from here")
            raise
        except BaseException as error:
            console.log("FAIL", task=task, error=f"{type(error).__name__}: {error}")
            raise
        else:
            console.log("COMPLETE", task=task, metrics=metrics)
            console.finish()
            console.say(f"task {task} of {of} done in {clock(time.time() - started)}: {metrics['shards']} shards")
        finally:
            console.close()


def _pieces_of(stage: str) -> Pieces:
    from nfm.stages.base import Unfit
    from nfm.stages.data import stage as data
    from nfm.stages.data.latents import stage as latents
    from nfm.stages.pairs import worklist as pairs

    found: dict[str, Pieces] = {"data": data, "latents": latents, "pairs": pairs}
    if stage not in found:
        raise Unfit(f"stage {stage!r} of the worklist: it is one of {', '.join(found)}; make a new one, `nfm worklist`")
    return found[stage]


def _listed(node: Node) -> Worklist:
    """What is pending of an artifact; its `spec.json` is written if it does not exist yet, and what tasks need."""
    from nfm.pipeline import runner
    from nfm.pipeline.artifacts.artifact import ArtifactError
    from nfm.pipeline.artifacts.intact import checked_inputs
    from nfm.pipeline.artifacts.lock import Lock
    from nfm.pipeline.console import StopRequest
    from nfm.stages.executors.slurm import Worklist
    from nfm.storage.files.copies import mirror
    from nfm.storage.files.paths import is_remote

    artifact, inputs = node.artifact(), node.input_artifacts()
    if artifact is None or inputs is None:
        raise ArtifactError(f"{node.name}: an input vanished while the list was made; run it again")
    if not is_remote(artifact.path):
        artifact.path.mkdir(parents=True, exist_ok=True)
    config: Any = node.config
    stop = StopRequest()
    with stop.listening(), Lock(artifact.path) as lock, runner.never_begun(artifact):
        with stop.at_once():
            paths = checked_inputs(inputs, lambda said: click.echo(f"{node.name}: {said}", err=True))
        spec = artifact.spec if artifact.started else runner.prepare(node, artifact, inputs)
        console = runner.console_of(node.name, artifact, stop, lock)
        try:
            done = node.name != "pairs" and artifact.done
            left = [] if done else _pieces_of(node.name).pieces_left(config, paths, artifact.path, console)
        finally:
            console.close()
    return Worklist(
        store=mirror.origin(artifact.path),
        fingerprint=spec["fingerprint"],
        inputs={role: mirror.origin(path) for role, path in paths.items()},
        config=config.model_dump(mode="json"),
        shards=tuple(left),
        stage=node.name,
    )
