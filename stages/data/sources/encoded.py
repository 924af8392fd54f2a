"""What sources of encoded images in files of many (tars, Parquet) share: labels, what is set aside, and decoding.

A source of this kind lists its rows when they are first needed: naming an artifact needs the digest alone.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nfm.stages.base import Reporter, Unfit
from nfm.stages.data.reading.decoding import Crop, Cut, Decoder, own_limit, shape_of, size_of
from nfm.stages.data.reading.labels import Labels
from nfm.stages.data.reading.many_in_one import ManyInOne
from nfm.stages.data.source import Loaded

Piece = tuple[slice, Callable[[int], Any]]  # some of the wanted rows, and what Pillow opens for each, by its position


class Listing(NamedTuple):
    """The rows of all files. A row that cannot be used has its reason in `problems`."""

    keys: list[str]
    files: np.ndarray  # [N] the number of the file
    places: np.ndarray  # [N] where the row stands in its file; rows of a file are read in this order
    problems: dict[int, str]
    labels: np.ndarray | None  # [N] as the files have them, int64; None if the images have no labels
    captions: list[str | None] | None
    classes: Sequence[str] | None = None  # names that the files themselves give


class EncodedImages(ABC):
    """Images in files that end with `ending`, by the settings of [data] that such a source reads.

    `images`, `labels` and `captions` name where in the files they are; each source says how.
    """

    name: str
    ending: str
    reads_urls = True

    def __init__(
        self,
        path: str | None,
        image_size: int | None = None,
        channels: int = 3,
        average: int = 1,
        classes: Sequence[str] | None = None,
        threads: int = 0,
        background: str = "white",
        crop: Crop = "centre",
        images: str | None = None,
        labels: str | None = None,
        captions: str | None = None,
        first_label: int | None = None,
    ):
        cut = Cut(image_size, channels, average, background, crop, threads)
        self.files, self.cut = ManyInOne(path, self.name, self.ending), cut
        self._given_classes, self._first = classes, first_label
        self._wanted = (images, labels, captions)

    @abstractmethod
    def listed(self) -> Listing:
        """Reads what is needed to list the rows, but no image."""

    @abstractmethod
    def pieces(self, number: int, rows: np.ndarray) -> Iterator[Piece]:
        """The images at these rows of file `number`, in the order of `places`, as many at a time as memory allows."""

    @abstractmethod
    def tell(self, report: Reporter) -> None:
        """Reports what is unusual about the files."""

    @staticmethod
    def shape_of(config: Any) -> tuple[int, int, int] | None:
        return shape_of(config)

    @functools.cached_property
    def listing(self) -> Listing:
        return self.listed()

    @property
    def keys(self) -> list[str]:
        return self.listing.keys

    @functools.cached_property
    def labels(self) -> np.ndarray:
        return self._labels.counted if self.classes else np.full(len(self.keys), -1, np.int64)

    @functools.cached_property
    def classes(self) -> list[str]:
        return self._usable.classes()

    @functools.cached_property
    def test(self) -> np.ndarray:
        return np.array(self.files.heldout, bool)[self.listing.files]

    @property
    def captions(self) -> list[str | None] | None:
        """The caption of each row, None for a row without; None if no row has one."""
        return self.listing.captions

    @functools.cached_property
    def _labels(self) -> Labels:
        found = self.listing
        values = np.full(len(found.keys), -1, np.int64) if found.labels is None else found.labels
        names = found.classes if self._given_classes is None else self._given_classes
        return Labels(values, found.keys, self.files.path, self._first or 0, names)

    @functools.cached_property
    def _usable(self) -> Labels:
        """The labels of rows that can be used."""
        good = self._good()
        return self._labels._replace(values=self._labels.values[good], keys=[self.keys[row] for row in good])

    def _good(self) -> list[int]:
        return [row for row in range(len(self.keys)) if row not in self.listing.problems]

    def load(self, rows: np.ndarray, scratch: Path, report: Reporter) -> Loaded:
        found = self.listing
        if not found.keys:
            raise Unfit(f"data.path = {self.files.path!r}: there is no image in it; name other files")
        self.files.tell_splits(report)
        self.tell(report)
        self._check_labels(report)
        problems = {place: found.problems.get(row) for place, row in enumerate(rows.tolist())}
        unusable = self._labels.outside(rows, len(self.classes)) | {at: why for at, why in problems.items() if why}
        left = np.setdiff1d(np.arange(len(rows)), list(unusable))
        with own_limit():
            size = size_of(self.cut, self._sample, len(self._good()))
            decoder = Decoder(self.cut, size, len(rows), scratch, report)
            decoder.set_aside(unusable)
            for positions, opener in self._read(left, rows):
                decoder.decode(positions, opener)
        return decoder.loaded(self.files.skipped)

    def digest(self, known: Path | None = None) -> dict[str, Any]:
        return self.files.digest(known)

    def _check_labels(self, report: Reporter) -> None:
        if self.listing.labels is not None:
            self._usable.check(report)
            return
        for field, value in (("classes", self._given_classes), ("first_label", self._first)):
            if value is not None:
                raise Unfit(f"data.{field} is of labels, but the images of {self.files.path} have none: leave it out")

    def _read(self, positions: np.ndarray, rows: np.ndarray) -> Iterator[tuple[list[int], Callable[[int], Any]]]:
        """The images at `rows[positions]`, in the order in which they stand in the files."""
        numbers, places = self.listing.files[rows[positions]], self.listing.places[rows[positions]]
        order = np.lexsort((places, numbers))
        ends = np.searchsorted(numbers[order], np.arange(len(self.files) + 1))
        for number in range(len(self.files)):
            own = positions[order[ends[number] : ends[number + 1]]]
            for part, opener in self.pieces(number, rows[own]) if len(own) else ():
                at = dict(zip(own[part].tolist(), range(part.start, part.stop)))
                yield list(at), functools.partial(_opened, opener, at)

    def _sample(self, step: int) -> Iterator[Any]:
        """Every `step`-th image of all files, whose shapes are looked at."""
        from nfm.stages.data.reading.pixels import MisfitError

        rows = np.array(self._good(), np.int64)[::step]
        for positions, opener in self._read(np.arange(len(rows)), rows):
            for position in positions:
                with contextlib.suppress(MisfitError):  # set aside when it is decoded
                    yield opener(position)


def _opened(opener: Callable[[int], Any], at: dict[int, int], position: int) -> Any:
    return opener(at[position])
