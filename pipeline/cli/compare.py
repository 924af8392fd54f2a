"""`nfm compare`: the same student on the pairs of each coupling, with the same evaluation, in one table."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nfm.pipeline.artifacts.artifact import Artifact, WrongArtifact
from nfm.pipeline.cli.compare_options import compared_options, overrides_of
from nfm.pipeline.cli.options import OutputFolder, at_once_option, config_option, json_option, set_option
from nfm.stages.base import Unfit
from nfm.storage.errors import StorageError, legible
from nfm.storage.errors.masked import masked
from nfm.storage.files import atomic
from nfm.storage.files.paths import inside
from nfm.storage.files.small_files import read_bytes

if TYPE_CHECKING:
    from nfm.pipeline.graph import Node

COMMAND, ORIGIN = "command.txt", "origin.json"


@click.command()
@config_option
@compared_options
@at_once_option
@set_option
@click.option("-o", "--output", type=OutputFolder(), help="Also put table, JSON and plots there.")
@click.option("--force", is_flag=True, help="Let --output write over what is there.")
@json_option
def compare(
    config_path: Path, couplings: list[str] | None, seeds: list[int] | None, overrides: tuple[str, ...],
    at_once: int, output: Path | None, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Train the same student on the pairs of each coupling and tabulate distance, curvature and speed.

    Makes what is missing: stores, students, evaluations. After a stop or a kill, the same command continues. With
    another coupling or seed, only the new ones are made. Without --couplings and --seeds, the [compare] table of the
    config applies.
    """
    from nfm.pipeline import builder, runner
    from nfm.pipeline.config import load
    from nfm.pipeline.runner import side_by_side
    from nfm.stages.evaluation import compare as stage

    config = load(config_path, (*overrides, *overrides_of(couplings, seeds)))
    nodes = builder.build(config, target=stage.NAME)
    if output is not None:
        _check_folder(output, nodes[stage.NAME], force)
    made = runner.run(nodes, stage.NAME, beside=side_by_side.of(config, stage.NAME, at_once))
    if output is not None:
        _copy(made, output)
    click.echo(read_bytes(made.path / (stage.TABLE if as_json else stage.TEXT)).decode().rstrip())
    if not as_json:
        click.echo(f"\n{made.reference}" + (f", copied to {output}" if output is not None else ""))


def _check_folder(output: Path, node: Node, force: bool) -> None:
    """Raises now, not after hours, if the result could not be written: a read-only folder, or one with another
    comparison.
    """
    try:
        output.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise Unfit(f"--output {output}: cannot be written ({error.strerror}); name another folder") from error
    if force:
        return
    held, artifact = _held(output), node.artifact()
    if held is None and (others := sorted(path.name for path in output.iterdir())):
        raise Unfit(
            f"{output} holds other files ({', '.join(others[:3])}), which could be written over: give a folder of its "
            "own, or --force"
        )
    if held is not None and (artifact is None or artifact.name != held):
        this = "is not made yet" if artifact is None else f"is {artifact.name}"
        raise WrongArtifact(
            f"{output} holds {held}, and this comparison {this}; give another --output, or --force to replace that one"
        )


def _held(folder: Path) -> str | None:
    """The comparison in a folder, by its artifact; None if there is none."""
    from nfm.stages.evaluation import compare as stage

    unknown = "a comparison that names no artifact" if (folder / stage.TABLE).exists() else None
    return _origin(folder).get("artifact", unknown)


def _origin(folder: Path) -> dict[str, Any]:
    """What the folder says about its contents; empty if that is missing or was edited."""
    try:
        return atomic.read_json(folder / ORIGIN)
    except (FileNotFoundError, StorageError):
        return {}


def _copy(made: Artifact, output: Path) -> None:
    """Copies the files of the artifact, with its inputs by content and the command that made it, to be committed
    together.
    """
    manifest = made.manifest()
    names = [file["path"] for file in manifest["files"]]
    for name in set(_origin(output).get("files", ())).difference(names):  # of the comparison that this one replaces
        (output / Path(name).name).unlink(missing_ok=True)
    told = {key: manifest[key] for key in ("fingerprint", "content_digest", "inputs")}
    # Written first: an interrupted copy can then be recognised, and the same command completes it.
    atomic.write_json(output / ORIGIN, {"artifact": made.name, **told, "files": names})
    folder = made.readable
    for name in names:
        shutil.copyfile(inside(folder, name), output / name)
    command = masked(legible(shlex.join(["nfm", *sys.argv[1:]])))
    atomic.write_bytes(output / COMMAND, f"{command}\n".encode())
