"""Refuses settings of [data] that cannot work, and reports settings that another one overrides.

Checks that hold for all data run whenever the artifact is named. The others run only when the data is made, so that
older data sets keep their names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nfm.stages.base import Reporter, Unfit
from nfm.stages.data.config import DataConfig
from nfm.stages.data.source import check_texts
from nfm.stages.data.sources import SOURCES, Source, settings_of

SHOWN = 8
WHEN_MADE = ("image_size", "channels", "path", "debian_package")
ANYBODYS = ("seed", "threads")  # settings that apply to every source
REASONS = {
    "crop": "does not cut images; leave it out",
    "background": "has no transparent pixels; leave it out",
    "points": "has images, no points of the plane; data.limit cuts them, data.count is how many glyphs are drawn",
}


def check_owners(config: DataConfig, when_made: bool = False) -> None:
    """Refuses a setting that only other sources read, unless it has its default."""
    owners: dict[str, list[str]] = {}
    for source in SOURCES:
        for field in settings_of(source):
            owners.setdefault(field, []).append(source)
    for field, sources in owners.items():
        if field in ANYBODYS or (field in WHEN_MADE) != when_made or config.source in sources:
            continue
        value = getattr(config, field)
        if value == type(config).model_fields[field].default:
            continue
        if field in REASONS:
            raise Unfit(f'data.{field} = {value!r}: source "{config.source}" {REASONS[field]}')
        *others, last = sources
        named = f"{', '.join(others)} and {last}" if others else last
        raise Unfit(f'data.{field} = {value!r} is of source {named}, not of "{config.source}": leave it out')


def check_settings(config: DataConfig, source: Source, report: Reporter) -> None:
    """Refuses settings that would have no effect or name no class. Reports those that another setting overrides."""
    check_owners(config, when_made=True)
    if config.images == "":
        raise Unfit('data.images = "" names nothing: leave it out for the default')
    if config.classes is not None:
        _check_classes(config.classes, source)
    if config.path is not None and config.debian_package is not None:
        report.say(f"data.path = {config.path!r} is read, data.debian_package = {config.debian_package!r} is not")
    if config.limit is not None and config.limit > (count := int((~source.test).sum())):
        report.say(f"data.limit = {config.limit:,} is more than there are: all {count:,} images are taken")
    if "heldout" in config.model_fields_set and (count := int(source.test.sum())):
        report.say(
            f"data.heldout = {config.heldout:g} is not used: the source's own test set of {count:,} images is held out"
        )


def tell_untrained(
    config: DataConfig, source: Source, train: np.ndarray, heldout: np.ndarray, report: Reporter
) -> None:
    """Reports classes without a usable row in `train`, and which of them are held out."""

    def images(rows: np.ndarray | slice) -> np.ndarray:
        labels = source.labels[rows]
        return np.bincount(labels[(labels >= 0) & (labels < len(source.classes))], minlength=len(source.classes))

    lacking = images(train) == 0
    if config.classes is None:
        lacking &= images(slice(None)) > 0  # the source has already reported numbers without images
    if not lacking.any():
        return
    held = lacking & (images(heldout) > 0)
    told = f"{lacking.sum():,} of {len(source.classes):,} classes have no training image: {_listed(source, lacking)}"
    report.say(f"{told}; held out are images of {_listed(source, held)}" if held.any() else told)


def _listed(source: Source, chosen: np.ndarray) -> str:
    places = np.flatnonzero(chosen).tolist()
    return ", ".join(repr(source.classes[place]) for place in places[:SHOWN]) + (", ..." if len(places) > SHOWN else "")


def _check_classes(classes: Sequence[str], source: Source) -> None:
    if not classes and source.classes:
        raise Unfit("data.classes = [] names no class, but the images have labels: name every class, or leave it out")
    if empty := [place for place, name in enumerate(classes) if not name.strip()]:
        raise Unfit(f"data.classes: the name at place {empty[0]}, counted from 0, is empty: write one")
    places: dict[str, int] = {}
    for place, name in enumerate(classes):
        if (first := places.setdefault(name, place)) != place:
            raise Unfit(
                f"data.classes: {name!r} stands at places {first} and {place}, counted from 0: one name a class"
            )


def check_names(config: DataConfig) -> None:
    """Refuses names that a reader of the data set would refuse."""
    for field in ("name", "image_decoder"):
        if (value := getattr(config, field)) is not None:
            check_texts(f"data.{field}", [value])
    check_texts("data.classes: a name", config.classes or ())
