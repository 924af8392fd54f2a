"""Options that many commands share. They read a place from the user as nfm.storage.files.places does."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from nfm.stages.display.endings import PICTURE, check_ending
from nfm.stages.trained.weights import parse
from nfm.storage.errors import NoPlace
from nfm.storage.files.paths import as_path, is_remote, local_path


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


class FileOrUrl(Place):
    """A file of this machine, or an object at a URL: one to read, or one to write in a folder that is there."""

    name = "FILE"

    def __init__(self, output: bool = False) -> None:
        self._output, self._local = output, LocalPath(exists=not output, dir_okay=False)

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        found = super().convert(value, param, ctx)
        found = found if is_remote(found) else self._local.convert(found, param, ctx)
        return in_a_folder(found) if self._output else found


def in_a_folder(found: Path) -> Path:
    """The path of what a command writes. Raises BadParameter unless its folder is there: the path may be mistyped."""
    if not is_remote(found) and not found.parent.is_dir():
        raise click.BadParameter(f"{found}: there is no folder {found.parent}: make it, or name another")
    return found


class OutputPlace(Place):
    """A file, a folder or a URL to write. A folder that holds it is there. Refused before any work."""

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return in_a_folder(super().convert(value, param, ctx))


class OutputFolder(LocalPath):
    """A folder to write, in one that is there. Refused before any work."""

    def __init__(self) -> None:
        super().__init__(file_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return in_a_folder(super().convert(value, param, ctx))


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
        return in_a_folder(found)


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


class Digest(click.ParamType):
    """The SHA-256 of a file."""

    name = "SHA256"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch("[0-9a-f]{64}", str(value)):
            self.fail(f"{value}: no SHA-256 of a file, 64 hex digits as of sha256sum", param, ctx)
        return str(value)


class Interval(click.ParamType):
    """Two times, T,T; t = 0 is the image, t = 1 the noise."""

    name = "T,T"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        try:
            first, last = (float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value}: write two times, for instance 0.2,0.8", param, ctx)
        if not 0 <= first < last <= 1:
            self.fail(f"{value}: it begins before it ends, and lies in 0,1; t = 1 is the noise", param, ctx)
        return first, last


class MovingAverage(click.ParamType):
    """The name of a moving average of a student."""

    name = "ema"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return str(parse(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def level_options(quick: str, deep: str) -> Any:
    """`--quick` and `--deep`, of which one may be given; the command gets `level`."""

    def decorate(command: Any) -> Any:
        @functools.wraps(command)
        def leveled(*arguments: Any, quick: bool, deep: bool, **others: Any) -> Any:
            if quick and deep:
                raise click.UsageError("--quick and --deep are two levels: give one of them")
            level = "quick" if quick else "deep" if deep else "default"
            return command(*arguments, level=level, **others)

        flags = (click.option("--quick", is_flag=True, help=quick), click.option("--deep", is_flag=True, help=deep))
        return flags[0](flags[1](leveled))

    return decorate


def at_once_option(command: Any) -> Any:
    """How many stages may be made at a time."""
    return click.option(
        "--at-once", default=1, type=Whole(1, 64), show_default=True, metavar="N",
        help="Stages that do not wait for each other, such as students of several couplings, are made N at a time, "
        "each with its share of the cores.",
    )(command)  # fmt: skip


def run_custom_option(told: str) -> Any:
    """Whose code may run, by the digests of its files."""
    return click.option("--run-custom", "digests", multiple=True, type=Digest(), metavar="SHA256", help=told)


# How guidance works, by the field of the sampler; the stage whose samples each option is of.
GUIDED = {"ramp": ("teacher", "--constant-guidance"), "temperature": ("teacher", "--attention-temperature"),
          "of": ("teacher", "--guide"), "interval": ("student", "--guidance-interval")}  # fmt: skip


def guidance_options(command: Any) -> Any:
    """The options of GUIDED; those that are not given are None."""
    options = [
        click.option("--constant-guidance", "ramp", flag_value=False, default=None, type=bool,
                     help="Of a teacher: equal for all tokens; it grows over them otherwise."),
        click.option("--attention-temperature", "temperature", type=Number(0, 100, above=True),
                     help="Of a teacher: of the unguided attention; guides without classes too.  [default: 1]"),
        click.option("--guide", "of", type=click.Choice(["am", "a", "m"]),
                     help="Of a teacher: log-scales a, shifts m.  [default: am]"),
        click.option("--guidance-interval", "interval", type=Interval(), metavar="T,T",
                     help="Of a student: the times at which it is guided.  [default: 0,1]"),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def is_given(name: str) -> bool:
    """Whether the user gave this option of the running command."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


def check_of_student(stage: str, *options: str) -> None:
    """Raises UsageError where one of these options of this command was given for the samples of a teacher."""
    if stage == "teacher":
        _refuse(options, "a student's samples; a teacher is inverted")


def check_of_solvers(folder: Path, *options: str) -> None:
    """Raises UsageError where one of these options was given for a student that is sampled by its user's function."""
    from nfm.stages.trained.sampling import has_own_sampler

    if has_own_sampler(folder):
        _refuse(options, "solvers, and this student has a sampler of its own")


def _refuse(options: Sequence[str], of: str) -> None:
    for name in options:
        if is_given(name):
            raise click.UsageError(f"--{name} is of {of}: leave it out")


def given_guidance(stage: str, strength: float, guided: Mapping[str, Any]) -> dict[str, Any]:
    """The options of GUIDED that were given. Raises UsageError for those of another stage, or without guidance."""
    given = {name: value for name, value in guided.items() if value is not None}
    for name in given:
        of, option = GUIDED[name]
        if stage != of:
            raise click.UsageError(f"{option} is of a {of}'s samples, this is a {stage}: leave it out")
        if not strength:
            raise click.UsageError(f"{option} says how guidance works, and there is none: give --guidance too")
    return given
