"""What works where the artifacts are in a bucket. Everything else is refused by name before anything is done."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click

from nfm.pipeline.artifacts.artifact import artifacts_root
from nfm.stages.base import Section
from nfm.storage.errors import NoPlace
from nfm.storage.files.paths import is_remote

COMMANDS = {
    *("run", "student", "compare", "plan", "status", "ls", "lineage", "sample", "audit", "repair", "gc"),
    *("pairs encode", "pairs export", "pairs head", "pairs info", "pairs report", "pairs seal", "pairs verify"),
    *("pairs worklist", "pairs card", "pairs add-field", "teacher import"),
}
# Settings whose work is done where the artifacts cannot be reached yet: field -> (values that work, what to write).
SETTINGS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "workers": ((1,), "start several processes by torchrun or `nfm submit`, or --set {section}.workers=1"),
}


def guard(group: click.Group, words: tuple[str, ...] = ()) -> None:
    """Makes every command below `group` that is not in `COMMANDS` refuse a bucket."""
    for name, command in group.commands.items():
        path = (*words, name)
        if isinstance(command, click.Group):
            guard(command, path)
        elif " ".join(path) not in COMMANDS and command.callback is not None:
            command.callback = _refusing(" ".join(path), command.callback)


def _refusing(name: str, callback: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(callback)
    def refuse(*arguments: Any, **options: Any) -> Any:
        root = artifacts_root()
        if is_remote(root):
            works = ", ".join(sorted(f"nfm {one}" for one in COMMANDS))
            raise NoPlace(
                str(root), f"`nfm {name}` does not work in a bucket; name a folder, or use what does: {works}",
                "NFM_ARTIFACTS=",
            )  # fmt: skip
        return callback(*arguments, **options)

    return refuse


def check_settings(sections: Iterable[tuple[str, Section]], processes: int) -> None:
    """Raises NoPlace for settings of stages that are to run, by name, which do not work in a bucket.

    `processes` of a launcher train in place of the workers of Ray.
    """
    if not is_remote(root := artifacts_root()) or processes > 1:
        return
    for name, section in sections:
        for field, (works, remedy) in SETTINGS.items():
            value = getattr(section, field, works[0])
            if value not in works and not (field == "workers" and hasattr(section, "executor")):
                told = f"{name}.{field} = {value} does not work in a bucket; {remedy.format(section=name)}"
                raise NoPlace(str(root), f"{told}, or name a folder", "NFM_ARTIFACTS=")
