"""Every output file that a user names has an ending that fits its contents, or is refused at once."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from nfm.pipeline.cli.options import OutputFile
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
    folder = isinstance(option.type, click.Path) and not option.type.file_okay
    if folder or name in OWN_FORMAT:
        return
    assert isinstance(option.type, OutputFile), f"{name}: use OutputFile, or name a folder"
    required = [f"./{param.name}" for param in command.params if isinstance(param, click.Argument)]
    result = CliRunner().invoke(command, [*required, "-o", "out.xyz"])
    assert result.exit_code == 2
    assert "out.xyz: its ending is .xyz" in result.output.replace("\n", " ")
