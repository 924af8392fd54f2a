"""The sources of images. A source lists its records (keys, labels, test flags) and loads rows as uint8 or floats.

The parameters of a source's class are the settings of [data] that it reads. A new source is one line in the table and
one file.
"""

import inspect
from typing import Any

from nfm.stages.data.source import Loaded, Source
from nfm.stages.data.sources.digits import Digits
from nfm.stages.data.sources.folder import ImageFolder
from nfm.stages.data.sources.glyphs import Glyphs
from nfm.stages.data.sources.idx import Idx
from nfm.stages.data.sources.npz import Npz
from nfm.stages.data.sources.parquet import Parquet
from nfm.stages.data.sources.planar import Checkerboard, Gaussians, Planar
from nfm.stages.data.sources.webdataset import WebDataset

SOURCES: dict[str, type[Any]] = {
    "digits": Digits,
    "glyphs": Glyphs,
    "idx": Idx,
    "npz": Npz,
    "images": ImageFolder,
    "webdataset": WebDataset,
    "parquet": Parquet,
    "checkerboard": Checkerboard,
    "gaussians": Gaussians,
}


def settings_of(name: str) -> list[str]:
    """The settings of [data] that this source reads."""
    return list(inspect.signature(SOURCES[name]).parameters)


def opened(config: Any) -> Any:
    """The source that [data] names. Its files are listed but not decoded."""
    return SOURCES[config.source](**{field: getattr(config, field) for field in settings_of(config.source)})


__all__ = ["SOURCES", "Checkerboard", "Digits", "Gaussians", "Glyphs", "Idx", "ImageFolder", "Loaded", "Npz", "Parquet",
           "Planar", "Source", "WebDataset", "opened", "settings_of"]  # fmt: skip
