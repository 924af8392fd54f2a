"""The config section [data]: which images, and how they are cut, split and ordered."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from nfm.stages.base import PlaceField, Section, added, one_of, operational
from nfm.stages.data.reading.axes import Axes
from nfm.stages.data.reading.decoding import Crop
from nfm.stages.data.sources import SOURCES
from nfm.stages.data.sources.folder import Colour
from nfm.stages.executors import EXECUTORS
from nfm.stages.trained.devices.where import AddressField
from nfm.storage.files.paths import as_path, is_remote


class DataConfig(Section):
    """[data]: which images, and how they are cut, split and ordered.

    For latents (float arrays of source `npz`, stored unchanged), `image_scale` is the number to divide by before
    `image_decoder` turns them into pictures. Both are only passed on to readers. `images` and `labels` name the arrays
    of source `npz` ("data", "labels"; labels "" means none). `axes` says what their axes are, `first_label` which
    number the first class has in the file. `background` is the colour behind transparent pixels of source `images`
    (docs/data.md). `crop` says how they are cut to `image_size`: "centre" resizes the central square, "adm" cuts as ADM
    does, whose crops the published statistics of ImageNet are of. `points` is the number of points that the planar
    sources make from `seed`, including held-out ones.
    `executor`, `workers` and `ray_address` say where encoded images are decoded, as those of [pairs] do; with workers
    `threads` are those of one, 0 for one.
    Source `glyphs` draws `count` images of `size` by `size` pixels, each with one of `letters`.
    """

    source: Annotated[str, one_of(SOURCES)] = "digits"
    path: PlaceField | None = operational(None)
    debian_package: str | None = operational(None)
    image_size: int | None = Field(None, ge=1)
    channels: Literal[1, 3] = 3
    average: int = Field(1, ge=1)
    classes: tuple[str, ...] | None = None
    heldout: float = Field(0.05, ge=0.0, lt=1.0)
    limit: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)
    rows_per_shard: int = Field(4096, ge=1)
    max_rejected: float = operational(0.0, ge=0.0, le=1.0)
    threads: int = operational(0, ge=0)
    executor: Annotated[str, one_of(EXECUTORS)] = operational("serial")
    workers: int = operational(0, ge=0)
    ray_address: AddressField | None = operational(None)
    points: int | None = added(None, ge=2)
    letters: str = added("ABCDEF")
    size: int = added(8, ge=4, le=128)
    count: int = added(60_000, ge=2)
    image_scale: float | None = added(None, gt=0, allow_inf_nan=False)
    image_decoder: str | None = added(None)
    images: str | None = added(None)
    labels: str | None = added(None)
    axes: Axes | None = added(None)
    first_label: int | None = added(None)
    background: Colour = added("white")
    crop: Crop = added("centre")
    captions: str | None = added(None)
    name: str | None = None  # written to dataset.json, which the content digest covers
    licence: str | None = operational(None)
    origin: str | None = operational(None)

    @field_validator("heldout", "max_rejected", mode="before")
    @classmethod
    def _share(cls, value: Any, info: ValidationInfo) -> Any:
        """Tells a count from a share."""
        if info.field_name == "heldout" and type(value) in (int, float) and value == 1:
            raise ValueError("1 is all images, which leaves none to train on: 0.05 is one in twenty")
        if isinstance(value, int | float) and value > 1:
            raise ValueError("a share of all images, from 0 to 1, no count: 0.05 is one in twenty")
        if type(value) is int and value == 1:
            raise ValueError("1 is all images, and reads like a count: write 1.0 for all, 0.001 for one in a thousand")
        return value

    @field_validator("path")
    @classmethod
    def _read_by_the_source(cls, path: str | None, info: ValidationInfo) -> str | None:
        """Refuses a URL for a source that reads files of this machine alone."""
        source = str(info.data.get("source"))
        if path is None or getattr(SOURCES.get(source), "reads_urls", False) or not is_remote(as_path(path)):
            return path
        raise ValueError(f'a URL, and source "{source}" reads files of this machine: copy them, or mount them')
