"""How commands and config fields take a place from a user: one rule for all of them, see nfm.storage.places."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import click
from pydantic import AfterValidator

from nfm.storage.errors import NoPlace
from nfm.storage.paths import as_path, local_path


class Place(click.ParamType):
    """A path or a URL; also an artifact's name, which reads as a path."""

    name = "PLACE"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        try:
            return as_path(value)
        except NoPlace as error:
            self.fail(str(error), param, ctx)


class LocalPath(click.Path):
    """A path of this machine; takes the options of click.Path."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(local_path(value), param, ctx)
        except NoPlace as error:
            self.fail(str(error), param, ctx)


PLACE = Place()
LOCAL_PATH = LocalPath()


def _local(text: str) -> str:
    try:
        return str(local_path(text))
    except NoPlace as error:
        raise ValueError(error.reason) from None


LocalField = Annotated[str, AfterValidator(_local)]  # a config field that names a path of this machine
