"""`nfm pairs`: inspect, check, seal, convert and extend pair stores; most of it also works on URLs."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Literal

import click

from nfm.pipeline.artifacts.artifact import Artifact, WrongArtifact, artifacts_root, check_store, find
from nfm.pipeline.cli.options import (
    PLACE,
    LocalPath,
    OutputFile,
    OutputPlace,
    Whole,
    json_option,
    level_options,
    picture_option,
)
from nfm.stages.display.units import clock, size
from nfm.stages.stores.export import CODECS, LAYOUTS
from nfm.storage.errors import StorageError, by
from nfm.storage.files import atomic
from nfm.storage.files.paths import is_remote, names_in

PLAIN_SECONDS = 15.0


@click.group()
def pairs() -> None:
    """Inspect, check, convert and extend pair stores.

    STORE is an artifact, a folder, one of its manifests, or a URL such as s3://bucket/store.
    """


@pairs.command()
@click.argument("store", type=PLACE)
@json_option
def info(store: Path, as_json: bool) -> None:
    """Show a store's recipe, generations, sizes, moments and coupling report."""
    from nfm.pipeline import overview
    from nfm.stages.stores import info as pairs_info

    elsewhere = is_remote(store)
    body = {"store": str(store), **pairs_info.info(store)} if elsewhere else overview.store_info(find(store))
    lines = (f"{key:18} {'-' if value is None else value}" for key, value in body.items())
    click.echo(json.dumps(body, indent=2) if as_json else "\n".join(lines))


@pairs.command()
@click.argument("store", type=PLACE)
@click.option("--json", "as_json", is_flag=True, help="For machines, with every figure.")
def report(store: Path, as_json: bool) -> None:
    """Measure the pairs of a store again: transport cost, how near the noise is to N(0, I), which images are paired.

    The store is not changed. Its teacher and data are searched among the artifacts by their content; nll on held-out
    rows needs them.
    """
    from nfm.stages.pairs import coupling_report

    where = _where(store)
    contents = coupling_report.contents_of(where)
    found = {role: folder for role, digest in contents.items() if (folder := _by_content(role, digest)) is not None}
    if "teacher" in contents and (missing := sorted(set(contents) - set(found))):
        lack = " and ".join(f"{role} {contents[role][:12]}" for role in missing)
        click.echo(f"no nll on held-out rows: {lack} not found in {artifacts_root()}", err=True)
    body = coupling_report.measure_at(where, found)
    if as_json:
        click.echo(json.dumps(body, indent=2, allow_nan=False))
        return
    for key, value in coupling_report.lines(body).items():
        click.echo(f"{key:18} {value}")
    for text in coupling_report.advice(body):
        click.echo(f"advice: {text}")


@pairs.command()
@click.argument("store", type=PLACE)
@click.option("-o", "--output", type=OutputFile((".md",)), help="The file. [default: README.md in the store]")
def card(store: Path, output: Path | None) -> None:
    """Write the README that hubs of data sets show: what the store is, from which teacher and data, how to read it.

    Name, origin and licence of the data are those of its artifact, if it is here. No other file is replaced.
    """
    from nfm.stages.pairs import coupling_report
    from nfm.stages.stores import card as pairs_card

    where = _where(store)
    content = coupling_report.contents_of(where)["data"]
    found = _by_content("data", content)
    if found is None:
        click.echo(f"the card lacks the data's name and licence: {content[:12]} is not in {artifacts_root()}", err=True)
    data = None if found is None else Artifact(found).manifest().get("dataset")
    click.echo(str(pairs_card.write(where, data, output)))


@pairs.command()
@click.argument("store", type=PLACE)
@click.option("-n", "count", default=8, type=Whole(1, 20), show_default=True, help="Pairs, and worst ones.")
@click.option("--draw", default=0, type=Whole(0, 999), show_default=True, help="Of which draw, from 0.")
@picture_option("head.png")
@click.option(
    "--teacher", default="auto", show_default=True, type=PLACE, metavar="ARTIFACT|auto|none",
    help="Who decodes the noise; auto looks for the store's own among the artifacts.",
)  # fmt: skip
def head(store: Path, count: int, draw: int, output: Path, teacher: Path) -> None:
    """Draw the first pairs of a store: image, noise, decoded noise; a histogram of z; the records with the
    worst nll.
    """
    from nfm.stages.stores import head as pairs_head

    where = _where(store)
    word = str(teacher)
    folder = None if word in ("auto", "none") else _teacher(find(teacher))
    if word == "auto" and (digest := pairs_head.teacher_of(where)) is not None:
        folder = _by_content("teacher", digest)
        if folder is None:
            click.echo(f"nothing is decoded: the store's teacher {digest[:12]} is not in {artifacts_root()}", err=True)
    click.echo(pairs_head.draw(where, count, draw, folder, output))
    click.echo(str(output))


@pairs.command()
@click.argument("store", type=PLACE)
@level_options("Sizes and digests of commits and manifests only.", "Also read every record as stock readers do.")
def verify(store: Path, level: Literal["quick", "default", "deep"]) -> None:
    """Check a store by itself, without its lineage; exit 1 on any finding."""
    from nfm.stages.stores import repair

    where = _where(store)
    findings = repair.verify(where, level)
    for finding in findings:
        click.echo(f"{finding.file}: {finding.problem}; {finding.remedy}")
    if findings:
        sys.exit(1)
    if left := repair.unfinished(where):
        click.echo(left)
    click.echo(f"clean: {repair.looked_at(where, level)}")


@pairs.command()
@click.argument("store", type=PLACE)
def seal(store: Path) -> None:
    """Seal the complete draws of a store as a generation."""
    from nfm.pipeline.runner import seal_store

    click.echo(str(seal_store(find(store)).reference))


@pairs.command()
@click.argument("store", type=PLACE)
@click.argument("target", type=OutputPlace())
@click.option("--layout", type=click.Choice([*LAYOUTS]), help="Default: the store's own.")
@click.option("--codec", type=click.Choice([*CODECS]), help="Of the noise. Default: the store's own.")
@click.option("--generation", type=Whole(1, 9999), help="Default: the newest.")
def export(store: Path, target: Path, layout: str | None, codec: str | None, generation: int | None) -> None:
    """Write a store to TARGET, a folder or URL, in another layout or codec.

    Every shard is checked before it is converted. After a stop or a kill, the same command continues. If the store has
    grown since then, it adds the new draws.
    """
    from nfm.stages.stores import export as pairs_export

    try:
        source = _where(store) if generation is None else _any_generation(store)
        for line in pairs_export.run(source, target, layout, codec, generation, _Progress()):
            click.echo(line)
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on from here", err=True)
        raise
    click.echo(str(target))


@pairs.command("add-field")
@click.argument("store", type=PLACE)
@click.argument("name")
@click.argument("file", type=LocalPath(exists=True, dir_okay=False))
def add_field(store: Path, name: str, file: Path) -> None:
    """Add a field NAME from FILE.npy, with one value for each source row, to a finished store.

    Readers join it by image row: store.batches(..., fields=["NAME"]).
    """
    from nfm.stages.stores import export as pairs_export

    field = pairs_export.add_field(_where(store), name, file)
    click.echo(f"{field.name}: {field.rows:,} rows of {field.dtype.name}, {by(field.shape)} each, in {field.folder}")


def _where(store: Path) -> Path:
    """A URL unchanged; anything else as the artifact that it names."""
    if is_remote(store):
        return store
    artifact = find(store)
    check_store(artifact)
    return artifact.reference


def _teacher(found: Artifact) -> Path:
    """The folder of a teacher that was named."""
    if (stage := found.spec.get("stage")) != "teacher":
        raise WrongArtifact(f"--teacher {found.name}: of the stage {stage or 'pairs'}, not a teacher")
    return found.readable


def _any_generation(store: Path) -> Path:
    """As `_where`, but a folder stays a folder instead of its newest generation.

    A named manifest stays that manifest.
    """
    return store if is_remote(store) or store.suffix == ".json" else find(store).path


def _by_content(stage: str, digest: str) -> Path | None:
    """The folder of the finished artifact with this content, if it is under the root; from a bucket it is brought."""
    for folder in (artifacts_root() / stage / name for name in names_in(artifacts_root() / stage)):
        for name in (name for name in names_in(folder) if name.startswith("manifest") and name.endswith(".json")):
            with contextlib.suppress(StorageError):  # damaged, which its audit reports
                if atomic.read_json(folder / name).get("content_digest") == digest:
                    return Artifact(folder).readable
    return None


class _Progress:
    """A line that is rewritten on a terminal; elsewhere a new line every 15 seconds."""

    def __init__(self) -> None:
        self._started = self._told = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int, read: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done
            if 0 < done < total:
                click.echo(f"export: {done:,} of {total:,} pairs are there already", err=True)
        seconds = max(now - self._started, 1e-9)
        rate = (done - self._first) / seconds
        left = f", {clock((total - done) / rate)} left" if rate else ""
        line = f"export: {done:,} of {total:,} pairs, {size(read / seconds)}/s{left}"
        if sys.stderr.isatty():
            click.echo(f"\r\033[K{line}" + ("\n" if done == total else ""), err=True, nl=False)
        elif now - self._told >= PLAIN_SECONDS:
            self._told = now
            click.echo(line, err=True)
