"""`nfm teacher`: teachers that were trained elsewhere."""

from __future__ import annotations

from pathlib import Path

import click

from nfm.pipeline.cli.options import LOCAL_PATH, Number, Whole, config_option, set_option
from nfm.pipeline.config import load


@click.group()
def teacher() -> None:
    """Take over a teacher that was trained elsewhere."""


@teacher.command("import")
@click.argument("file", type=LOCAL_PATH)
@config_option
@set_option
@click.option(
    "--eta", type=Number(0, 10, above=True),
    help="Deviation of the noise that it was trained with. Default: as the file's name tells it.",
)  # fmt: skip
@click.option("--head-size", type=Whole(1, 4096), help="Channels of an attention head.  [default: 64, the published]")
def import_teacher(
    file: Path, config_path: Path, overrides: tuple[str, ...], eta: float | None, head_size: int | None
) -> None:
    """Make a teacher artifact of FILE.pth, a TarFlow checkpoint as its authors save it.

    sigma_f is measured on the config's data, which must be what the flow was trained on, its classes in the same
    order. No code of the file runs.
    """
    from nfm.pipeline import builder, runner
    from nfm.stages.trained.foreign import imported

    config = load(config_path, overrides)
    section = imported.section(config.teacher, file, eta, head_size)
    made = runner.run(builder.importing(config, section), "teacher")
    click.echo(f'to use it, write in {config_path}, section [teacher]: artifact = "{made.name}"', err=True)
    click.echo(str(made.reference))
