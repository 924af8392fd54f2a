"""All commands of `nfm`, for tests about each of them."""

from __future__ import annotations

from collections.abc import Iterator

import click

from nfm.pipeline.cli import cli


def commands(group: click.Command = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """(words of its name, command)."""
    if isinstance(group, click.Group):
        for name, command in group.commands.items():
            yield from commands(command, (*path, name))
    else:
        yield path, group
