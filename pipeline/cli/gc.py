"""`nfm gc`: lists or removes what is not needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nfm.pipeline.cli.options import LOCAL_PATH, Number, json_option

if TYPE_CHECKING:
    from nfm.pipeline.upkeep import gc as collecting


@click.command()
@click.option("--dry-run", is_flag=True, help="List only.")
@click.option(
    "-c", "--config", "configs", multiple=True, type=LOCAL_PATH, metavar="F",
    help="A config in use: what it reaches stays. Repeatable.",
)  # fmt: skip
@click.option(
    "--older-than", "days", default=7.0, type=Number(0, 36_500), show_default=True, metavar="DAYS",
    help="Artifacts that changed later than this stay.",
)  # fmt: skip
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def gc(dry_run: bool, configs: tuple[Path, ...], days: float, yes: bool, as_json: bool) -> None:
    """Remove files of killed attempts, quarantined shards, and artifacts that nothing depends on.

    Students, evaluations, comparisons and reports are kept, and everything that they were made from. Pair stores are
    kept unless -c names the configs in use. Then those stores are removed that none of these configs reaches, that no
    student here was trained on and that no submission lists. What was written to within the hour always stays.
    """
    from nfm.pipeline.artifacts.artifact import artifacts_root
    from nfm.pipeline.config import load
    from nfm.pipeline.upkeep import gc as collecting

    older_than = days * 86400
    found = collecting.listing([load(path) for path in configs], older_than)
    if not as_json:
        if found.going or found.staying:
            click.echo(collecting.as_text(found))
        if not found.going:
            click.echo(f"nothing to remove under {artifacts_root()}; what was written to within the hour stays")
            return
    gone: list[collecting.Garbage] = []
    if found.going and not dry_run:
        if not yes:
            _ask(collecting.total(found.going))
        gone = collecting.remove(found.going, older_than, lambda text: click.echo(text, err=True))
    if as_json:
        click.echo(json.dumps(_body(found, gone, dry_run), indent=2))
    elif dry_run:
        click.echo(f"would go: {collecting.total(found.going)}")
    else:
        click.echo(f"removed {collecting.total(gone)}" if gone else "removed nothing")


def _ask(what: str) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError(f"this would remove {what}; nobody can be asked here: add --yes, or --dry-run to look")
    click.confirm(f"remove {what}?", abort=True, err=True)


def _body(found: collecting.Listing, gone: list[collecting.Garbage], dry_run: bool) -> dict[str, object]:
    names = {one.name for one in gone}
    return {
        "dry_run": dry_run,
        "found": [
            {"kind": one.kind, "name": one.name, "files": one.files, "bytes": one.bytes, "reason": one.reason,
             "removed": one.name in names}
            for one in found.going
        ],
        "staying": [{"name": name, "reason": reason} for name, reason in found.staying],
        "removed_files": sum(one.files for one in gone),
        "removed_bytes": sum(one.bytes for one in gone),
    }  # fmt: skip
