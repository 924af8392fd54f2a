"""`nfm pairs worklist` and `nfm pairs encode`: the two halves of making pairs in an array of independent tasks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nfm.pipeline.cli.options import MANY, FileOrUrl, Whole, config_option, set_option

if TYPE_CHECKING:
    from nfm.pipeline.graph import Node


@click.command()
@config_option
@set_option
@click.option("-o", "--output", required=True, type=FileOrUrl(), help="Where it goes, a file or a URL.")
def worklist(config_path: Path, overrides: tuple[str, ...], output: Path) -> None:
    """Write the fixed, numbered list of missing shards of a store, for the tasks of an array.

    Makes the inputs of the pairs (data, teacher) if they are missing. A list is never changed: an existing file is kept
    if it has all pending shards, and refused if not.
    """
    from nfm.pipeline import builder, prechecks, runner
    from nfm.pipeline.config import load
    from nfm.stages.pairs import worklist as pairs_worklist

    config = load(config_path, overrides)
    nodes = builder.build(config)
    node = nodes["pairs"]
    prechecks.check(nodes, node.name)
    for needed in node.inputs.values():
        runner.run(nodes, needed.name)
    store, inputs = _prepared(node)
    found = pairs_worklist.freeze(config.pairs, inputs, store, output.absolute())
    click.echo(f"{output}: {len(found.shards):,} shards of {store} are to be encoded")


@click.command()
@click.argument("file", type=FileOrUrl(exists=True))
@click.option("--task", required=True, type=Whole(0, MANY), help="Which task this is, from 0.")
@click.option("--of", required=True, type=Whole(1, MANY), help="How many tasks share the list.")
def encode(file: Path, task: int, of: int) -> None:
    """Encode the shards of a worklist that belong to one task: those whose number mod --of is --task.

    Exit 0 when all of them are committed, 1 when some failed three times, 130 when stopped: SIGTERM and SIGINT drop the
    current shard, SIGUSR1 finishes it. The same command continues with the remaining shards.
    """
    from nfm.pipeline import runner
    from nfm.pipeline.artifacts.artifact import Artifact
    from nfm.pipeline.console import StopRequest
    from nfm.stages.base import Stopped
    from nfm.stages.display.units import clock
    from nfm.stages.pairs import worklist as pairs_worklist
    from nfm.storage.files.paths import as_path

    if task >= of:
        raise click.UsageError(f"--task {task} --of {of}: tasks count from 0 to {of - 1}")
    stop = StopRequest()
    with stop.listening():
        found = pairs_worklist.load(file)
        console = runner.console_of("pairs", Artifact(as_path(found.store)), stop)
        started = time.time()
        console.log("START", worklist=str(file), task=task, of=of, versions=runner.versions())
        try:
            metrics = pairs_worklist.encode(found, task, of, console)
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


def _prepared(node: Node) -> tuple[Path, dict[str, Path]]:
    """(the folder of the store, its inputs by role).

    `spec.json` is written, under the lock, if it does not exist yet.
    """
    from nfm.pipeline import runner
    from nfm.pipeline.artifacts.artifact import ArtifactError, readable
    from nfm.pipeline.artifacts.lock import Lock
    from nfm.storage.files.paths import is_remote

    artifact, inputs = node.artifact(), node.input_artifacts()
    if artifact is None or inputs is None:
        raise ArtifactError(f"{node.name}: an input vanished while the list was made; run it again")
    if not artifact.started:
        if not is_remote(artifact.path):
            artifact.path.mkdir(parents=True, exist_ok=True)
        with Lock(artifact.path), runner.never_begun(artifact):
            runner.prepare(node, artifact, inputs)
    return artifact.path, readable(inputs)
