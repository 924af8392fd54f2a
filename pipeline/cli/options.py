"""Options that many commands share. They read a place from the user as nfm.storage.files.places does."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click

from nfm.stages.display.endings import PICTURE, check_ending
from nfm.storage.errors import NoPlace
from nfm.storage.files.paths import as_path, local_path


class Place(click.ParamType):
    """A path or a URL, or the name of an artifact, which looks like a path."""

    name = "PLACE"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        try:
            return as_path(value)
        except NoPlace as error:
            self.fail(str(error), param, ctx)


class LocalPath(click.Path):
    """A path of this machine, with the options of click.Path."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(local_path(value), param, ctx)
        except NoPlace as error:
            self.fail(str(error), param, ctx)


PLACE = Place()
LOCAL_PATH = LocalPath()


class OutputFile(LocalPath):
    """A file to write in a folder that is there; its ending says what is inside. Refused before any work."""

    def __init__(self, endings: Collection[str]) -> None:
        super().__init__(dir_okay=False)
        self.endings = endings

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        try:
            check_ending(found, self.endings)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not found.parent.is_dir():
            self.fail(f"{found}: there is no folder {found.parent}: make it, or name another", param, ctx)
        return found


MANY = 10**12  # upper limit of counts that have no smaller one


class Whole(click.IntRange):
    """A whole number. Every option of this kind states its range."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__(least, most)


class Number(click.FloatRange):
    """A number in a range; nan and inf are refused. click's own range accepts nan."""

    def __init__(self, least: float, most: float, above: bool = False) -> None:
        """With `above`, the least value itself is not allowed."""
        super().__init__(least, most, min_open=above)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value} is no finite number", param, ctx)
        return found


SEED = Whole(0, 2**64 - 1)


config_option = click.option(
    "-c", "--config", "config_path", required=True, type=LOCAL_PATH, metavar="F", help="The run's TOML file."
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a field of the config. Repeatable."
)
json_option = click.option("--json", "as_json", is_flag=True, help="For machines.")


def picture_option(default: str) -> Any:
    """Where to write the picture of a command."""
    written = OutputFile(PICTURE)
    told = "The picture, in the format of its ending."
    return click.option("-o", "--output", default=default, show_default=True, type=written, help=told)
