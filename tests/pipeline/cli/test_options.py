"""Rules for every option of every command: numbers have a range without nan, and wrong use exits with 2."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from nfm.pipeline.cli.options import Number, Whole
from tests.support.commands import commands

if TYPE_CHECKING:
    from tests.conftest import Lab

PARAMETERS = {
    f"{' '.join(path)} {parameter.opts[0]}": (path, command, parameter)
    for path, command in commands()
    for parameter in command.params
}
NUMBERS = [
    name
    for name, (_, _, parameter) in PARAMETERS.items()
    if isinstance(parameter.type, click.types.IntParamType | click.types.FloatParamType)
]


def test_there_are_numbers_to_check() -> None:
    assert {"sample --seed", "sample --guidance", "plan --rate", "gc --older-than"} <= set(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_says_from_where_to_where_it_goes(name: str) -> None:
    kind = PARAMETERS[name][2].type
    assert isinstance(kind, Whole | Number)
    assert kind.min is not None
    assert kind.max is not None


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_nan_or_infinite_or_out_of_its_range(empty: Lab, name: str) -> None:
    path, command, parameter = PARAMETERS[name]
    needed = [word for other in command.params if other.required and other is not parameter for word in _given(other)]
    for value in ("nan", "inf", "-inf", "-1e300", "1e300", f"-{10**30}", f"{10**30}", "x", ""):
        told = empty.nfm(*path, *needed, parameter.opts[0], value, exits=2).stderr
        assert f"Invalid value for '{parameter.opts[0]}'" in told or f"Invalid value for '{parameter.opts[-1]}" in told


def _given(parameter: click.Parameter) -> list[str]:
    return [*([parameter.opts[0]] if isinstance(parameter, click.Option) else []), _some(parameter)]


def _some(parameter: click.Parameter) -> str:
    """A value of the right kind for an option that must be there."""
    if isinstance(parameter.type, click.Choice):
        return str(parameter.type.choices[0])
    return "1" if isinstance(parameter.type, click.types.IntParamType) else "tiny.toml"


@pytest.mark.parametrize("name", [name for name in PARAMETERS if isinstance(PARAMETERS[name][2], click.Option)])
def test_every_option_says_what_it_is_and_what_repeats_and_what_it_is_without_it(name: str) -> None:
    option = PARAMETERS[name][2]
    assert isinstance(option, click.Option)
    told = option.help or ""
    assert told.endswith((".", "]")), "a sentence"
    assert not option.multiple or "Repeatable." in told
    given = option.get_default(click.Context(click.Command("nfm")))
    assert (
        option.is_flag
        or option.multiple
        or not isinstance(given, str | int | float)
        or option.show_default
        or "default" in told.lower()
    )
    assert option.name != "output" or {"-o", "--output"} == set(option.opts)


WRONG = {
    "a folder for a config": ("plan", "pairs", "-c", "."),
    "a nameless data path": ("plan", "pairs", "-c", "tiny.toml", "--set", 'data.source="idx"'),
    "a data path of nothing": ("run", "data", "-c", "tiny.toml", "--set", 'data.source="images"', "--set",
                               'data.path="none"'),
    "a patch that does not divide": ("run", "teacher", "-c", "tiny.toml", "--set", "teacher.patch=3"),
    "samples of a store": ("sample", "{pairs}"),
    "an even NFE of Heun": ("sample", "{student}", "--nfe", "8"),
    "a diffusion of the ODE": ("sample", "{student}", "--diffusion", "constant"),
    "the default diffusion, asked for, of the ODE": ("sample", "{student}", "--solver", "heun", "--diffusion", "sigma"),
    "a moving average of a teacher": ("sample", "{teacher}", "--ema", "0.05"),
    "a moving average that was not kept": ("sample", "{student}", "--ema", "0.05"),
    "a moving average without a width": ("sample", "{student}", "--ema", "small"),
    "no NFE": ("sample", "{student}", "--nfe", "0"),
    "a negative seed": ("sample", "{student}", "--seed", "-1"),
    "too many shards": ("plan", "pairs", "-c", "tiny.toml", "--set", "pairs.rows_per_shard=1", "--images", "10000000",
                        "--image-shape", "1x8x8"),
    "an artifact that is not there": ("lineage", "pairs/000000000000"),
    "a store that is none": ("pairs", "seal", "{teacher}"),
    "a student of pairs that is not there": ("plan", "pairs", "-c", "tiny.toml", "--set", 'pairs.coupling="reflow"',
                                             "--set", 'pairs.student="/nope"'),
    "two students of pairs": ("plan", "pairs", "-c", "tiny.toml", "--set", 'pairs.student="{student}"', "--set",
                              'pairs.reflow_of="nfm"'),
    "a negative seed of the data": ("plan", "data", "-c", "tiny.toml", "--set", "data.seed=-1"),
    "a comparison into a device": ("compare", "-c", "tiny.toml", "--couplings", "independent", "-o", "/dev/null"),
    "an even NFE of reflow": ("run", "pairs", "-c", "tiny.toml", "--set", 'pairs.coupling="reflow"', "--set",
                              "pairs.reflow_nfe=8"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_use_ends_with_2_in_one_message_and_leaves_nothing_behind(made: Lab, what: str) -> None:
    def there() -> list[Path]:
        """All but the receipts of files of a source that were read."""
        return sorted(path for path in made.artifacts.rglob("*") if ".sources" not in path.parts)

    before = there()
    names = {stage: made.name(stage) for stage in ("pairs", "student", "teacher")}
    told = made.nfm(*(word.format(**names) for word in WRONG[what]), exits=2)
    assert len(told.stderr.strip().splitlines()) <= 5
    assert there() == before
