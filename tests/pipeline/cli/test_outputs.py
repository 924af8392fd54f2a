"""Every output file that a user names has an ending that fits its contents, or is refused at once."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from nfm.pipeline.cli.options import OutputFile, OutputFolder
from nfm.pipeline.cli.pairs import export
from tests.support.commands import commands

BENCHMARKS = (
    "codecs",
    "kill_reader",
    "scale",
    "marginals",
    "studies",
    "teacher_curve",
    "store.command",
    "encode.command",
    "train.command",
)
OWN_FORMAT = {"nfm worklist", "nfm pairs worklist"}  # which only `nfm work` reads, under any name


def outputs() -> Iterator[tuple[str, click.Command, click.Option]]:
    """(command's name, command, option) of each that takes -o or --output."""
    named = [(f"nfm {' '.join(path)}", command) for path, command in commands()]
    for module in BENCHMARKS:
        found = vars(importlib.import_module(f"benchmarks.{module}")).values()
        named += [(module, command) for command in found if isinstance(command, click.Command)]
    for name, command in named:
        for option in command.params:
            if {"-o", "--output"} & set(option.opts):
                assert isinstance(option, click.Option)
                yield name, command, option


@pytest.mark.parametrize(("name", "command", "option"), list(outputs()))
def test_an_output_is_a_folder_or_a_file_whose_ending_is_checked(
    name: str, command: click.Command, option: click.Option
) -> None:
    assert {"-o", "--output"} <= set(option.opts), f"{name}: both spellings, as everywhere"
    if isinstance(option.type, OutputFolder) or name in OWN_FORMAT:
        return
    assert isinstance(option.type, OutputFile), f"{name}: use OutputFile or OutputFolder"
    required = [f"./{param.name}" for param in command.params if isinstance(param, click.Argument)]
    result = CliRunner().invoke(command, [*required, "-o", "out.xyz"])
    assert result.exit_code == 2
    assert "out.xyz: its ending is .xyz" in result.output.replace("\n", " ")


@pytest.mark.parametrize(("name", "command", "option"), list(outputs()))
def test_an_output_whose_folder_is_not_there_is_refused_and_the_folder_not_made(
    name: str, command: click.Command, option: click.Option, tmp_path: Path
) -> None:
    ending = f".{min(option.type.endings)}".replace("..", ".") if isinstance(option.type, OutputFile) else ""
    with pytest.raises(click.BadParameter, match="there is no folder"):
        option.type.convert(str(tmp_path / "mistyped" / f"out{ending}"), option, None)
    assert not (tmp_path / "mistyped").exists()
    assert option.type.convert(str(tmp_path / f"out{ending}"), option, None) == tmp_path / f"out{ending}"


def test_the_target_of_an_export_is_in_a_folder_that_is_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(export, ["x", str(tmp_path / "mistyped" / "copy")])
    assert result.exit_code == 2
    assert "there is no folder" in result.output.replace("\n", " ")
