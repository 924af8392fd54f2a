"""`--couplings` and `--seeds`, for `compare` and for the commands that plan, run or show a comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from nfm.pipeline.config import Override

Command = TypeVar("Command", bound=Callable[..., Any])


class Seeds(click.ParamType):
    """Whole numbers separated by commas."""

    name = "SEEDS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isascii() and part.isdecimal() and len(part) <= 18 for part in parts):
            self.fail(f"{value!r}: write whole numbers below 10^18 with commas between, for instance 0,1,2", param, ctx)
        return [int(part) for part in parts]


class Couplings(click.ParamType):
    """Variants separated by commas. The config decides which ones exist."""

    name = "COUPLINGS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        parts = [part.strip() for part in str(value).split(",") if part.strip()]
        if not parts:
            self.fail(f"{value!r}: names none; write for instance independent,nfm,nfm:soften=0.5", param, ctx)
        return parts


def compared_options(command: Command) -> Command:
    """Adds both options."""
    for option in (
        click.option(
            "--seeds", type=Seeds(), metavar="0,1,...",
            help="Of those couplings that name none of their own: each a student. Default: compare.seeds.",
        ),
        click.option(
            "--couplings", type=Couplings(), metavar="A,B,...",
            help="To be compared, such as independent,nfm,nfm:soften=0.5,nfm@0+1+2. Default: compare.couplings.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def overrides_of(couplings: list[str] | None, seeds: list[int] | None, stage: str = "compare") -> tuple[str, ...]:
    """The options as overrides of the config. Raises UsageError for a stage that compares nothing."""
    given = {"couplings": couplings, "seeds": seeds}
    named = {key: value for key, value in given.items() if value is not None}
    if named and stage != "compare":
        raise click.UsageError(f"--{' and --'.join(named)}: of the stage compare, not of {stage}; leave it out")
    if seeds is not None and couplings is not None and all("@" in coupling for coupling in couplings):
        raise click.UsageError("--seeds: every coupling names its own seeds, after @; leave it out")
    return tuple(
        Override(f"compare.{key}={json.dumps(value)}", f"--{key} {','.join(map(str, value))}")
        for key, value in named.items()
    )
