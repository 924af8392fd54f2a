"""What sources of encoded images in files of many (tars, Parquet) share: labels, what is set aside, and decoding.

A source of this kind lists its rows when they are first needed: naming an artifact needs the digest alone.
"""

from __future__ import annotations

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nfm.stages.base import Reporter, Unfit
from nfm.stages.data.reading.decoding import Crop, Cut, Decoder, own_limit, shape_of, size_of
from nfm.stages.data.reading.labels import Labels
from nfm.stages.data.reading.many_in_one import ManyInOne
from nfm.stages.data.source import Encoded, Loaded, Places, Stopping
from nfm.storage.files.paths import is_remote

Piece = tuple[slice, Callable[[int], Any]]  # some of the places, and what Pillow opens for each, by its position


class Listing(NamedTuple):
    """The rows of all files. A row that cannot be used has its reason in `problems`."""

    keys: list[str]
    files: np.ndarray  # [N] the number of the file
    places: np.ndarray  # [N] where the row stands in its file; rows of a file are read in this order
    problems: dict[int, str]
    labels: np.ndarray | None  # [N] as the files have them, int64; None if the images have no labels
    captions: list[str | None] | None
    classes: Sequence[str] | None = None  # names that the files themselves give
    sizes: np.ndarray | None = None  # [N] bytes of the encoded image, if its place does not say where it ends


class Standing(NamedTuple):
    """Where images are: int64 [n] each, as in `Listing`."""

    file: np.ndarray
    place: np.ndarray
    bytes: np.ndarray


class EncodedImages(Encoded):
    """Images in files that end with `ending`, by the settings of [data] that such a source reads.

    `images`, `labels` and `captions` name where in the files they are; each source says how.
    """

    name: str
    ending: str
    reads_urls = True
    anywhere = True  # whether an image of a local file is read without those around it

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
        self.seeks, self.skipped = self.anywhere and not any(map(is_remote, self.files.paths)), self.files.skipped
        self._given_classes, self._first = classes, first_label
        self._wanted = (images, labels, captions)

    @abstractmethod
    def listed(self) -> Listing:
        """Reads what is needed to list the rows, but no image."""

    @abstractmethod
    def pieces(self, number: int, places: np.ndarray, sizes: np.ndarray) -> Iterator[Piece]:
        """The images at these places of file `number`, which ascend, as many at a time as memory allows."""

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

    def look(self, report: Reporter) -> tuple[int, int]:
        if not self.listing.keys:
            raise Unfit(f"data.path = {self.files.path!r}: there is no image in it; name other files")
        self.files.tell_splits(report)
        self.tell(report)
        self._check_labels(report)
        with own_limit():
            return size_of(self.cut, self._sample, len(self._good()))

    def about(self) -> dict[str, Any]:
        return self.files.about()

    def recall(self, about: Mapping[str, Any]) -> None:
        """Takes over what `about` said in the process that listed the rows."""
        self.files.recall(about)

    def places(self, rows: np.ndarray) -> Places:
        found = self.listing
        outside = self._labels.outside(rows, len(self.classes))
        return {
            "file": found.files[rows].tolist(),
            "place": found.places[rows].tolist(),
            "bytes": [0] * len(rows) if found.sizes is None else found.sizes[rows].tolist(),
            "problem": [found.problems.get(row, outside.get(at)) for at, row in enumerate(rows.tolist())],
        }

    def decode(
        self, places: Places, about: Mapping[str, Any], size: Sequence[int], scratch: Path, stopping: Stopping
    ) -> Loaded:
        self.recall(about)
        unusable = {at: why for at, why in enumerate(places["problem"]) if why is not None}
        left = np.array([at for at in range(len(places["problem"])) if at not in unusable], np.int64)
        with own_limit():
            decoder = Decoder(self.cut, (size[0], size[1]), len(places["problem"]), scratch, stopping)
            decoder.set_aside(unusable)
            where = Standing(*(np.array(places[name], np.int64)[left] for name in Standing._fields))
            for some, opener in self._read(where):
                at = dict(zip(left[some].tolist(), some))
                decoder.decode(list(at), functools.partial(_opened, opener, at))
        return decoder.loaded()

    def digest(self, known: Path | None = None) -> dict[str, Any]:
        return self.files.digest(known)

    def _check_labels(self, report: Reporter) -> None:
        if self.listing.labels is not None:
            self._usable.check(report)
            return
        for field, value in (("classes", self._given_classes), ("first_label", self._first)):
            if value is not None:
                raise Unfit(f"data.{field} is of labels, but the images of {self.files.path} have none: leave it out")

    def _read(self, where: Standing) -> Iterator[tuple[list[int], Callable[[int], Any]]]:
        """The images at these places, in the order in which they stand in the files: numbers of places, some at a time,
        and what opens the image of a number.
        """
        order = np.lexsort((where.place, where.file))
        ends = np.searchsorted(where.file[order], np.arange(len(self.files) + 1))
        for number in range(len(self.files)):
            own = order[ends[number] : ends[number + 1]]
            for part, opener in self.pieces(number, where.place[own], where.bytes[own]) if len(own) else ():
                at = dict(zip(own[part].tolist(), range(part.start, part.stop)))
                yield list(at), functools.partial(_opened, opener, at)

    def _sample(self, step: int) -> Iterator[Any]:
        """Every `step`-th image of all files, whose shapes are looked at."""
        from nfm.stages.data.reading.pixels import MisfitError

        rows = np.array(self._good(), np.int64)[::step]
        found = self.listing
        sizes = np.zeros(len(found.keys), np.int64) if found.sizes is None else found.sizes
        for numbers, opener in self._read(Standing(found.files[rows], found.places[rows], sizes[rows])):
            for position in numbers:
                with contextlib.suppress(MisfitError):  # set aside when it is decoded
                    yield opener(position)


def _opened(opener: Callable[[int], Any], at: dict[int, int], position: int) -> Any:
    return opener(at[position])
