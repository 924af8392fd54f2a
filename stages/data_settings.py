"""Settings of [data] that cannot stand: refused by name before anything is read or written for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nfm.stages.stage import StageError
from nfm.storage import checked
from nfm.storage.errors import StorageError

if TYPE_CHECKING:
    from nfm.stages.data import DataConfig


def check_names(config: DataConfig, classes: Sequence[str]) -> None:
    """Names that a reader of the data set would refuse, by the reader's own rule; `classes` are the source's."""
    try:
        for field in ("name", "image_decoder"):
            if (value := getattr(config, field)) is not None:
                checked.text(f"data.{field}", value)
        where = f"{config.path}: the name of a class folder" if config.classes is None else "data.classes: a name"
        for name in classes:
            checked.text(where, name)
    except StorageError as error:
        raise StageError(f"{error}: rename it") from error
