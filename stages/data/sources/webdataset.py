"""Tars of samples as WebDataset's own writer and img2dataset make them: an image and what is known of it by one key.

docs/data.md says what is read, what is set aside, and why.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from nfm.stages.base import Reporter, StageError
from nfm.stages.data.reading.decoding import SHAPE_SAMPLE, Crop, Cut, Decoder, common_size, own_limit, shape_of
from nfm.stages.data.reading.labels import Labels
from nfm.stages.data.reading.many_in_one import ManyInOne
from nfm.stages.data.reading.sample_facts import Facts
from nfm.stages.data.reading.tar_samples import Member, samples
from nfm.stages.data.source import Loaded
from nfm.storage.errors import legible

ENDINGS = ("jpg", "jpeg", "png", "webp")
NOTHING = Member(0, 0)
MOST_BYTES = 1 << 30  # of an encoded image


class _Listing(NamedTuple):
    keys: list[str]
    files: np.ndarray  # [N] the number of the file that has the sample
    at: np.ndarray  # [N] where the image's bytes begin in that file
    bytes: np.ndarray  # [N]
    problems: dict[int, str]  # row -> why it cannot be used
    facts: Facts


class WebDataset:
    """One tar, those of a folder, or those of a pattern. Keys are the name of the tar and the sample's key in it.

    `images` is the ending of the image's member where a sample has several. `labels` and `captions` are fields of the
    `.json` member, by default the `.cls` and the `.txt` member; "" for none.
    """

    name = "webdataset"
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
        self.files = ManyInOne(path, self.name, ".tar")
        self.cut = Cut(image_size, channels, average, background, crop, threads)
        self._ending, self._fields = images, (labels, captions)
        self._classes, self._first = classes, first_label or 0

    @staticmethod
    def shape_of(config: Any) -> tuple[int, int, int] | None:
        return shape_of(config)

    # The headers of all tars are read when they are first needed: naming an artifact needs the digest alone.

    @functools.cached_property
    def _listing(self) -> _Listing:
        keys: list[str] = []
        files: list[int] = []
        members: list[Member] = []
        problems: dict[int, str] = {}
        facts = Facts(*self._fields, self._classes, self._first)
        for number, path in enumerate(self.files.paths):
            with self.files.open(number) as file:
                for sample in samples(file, path, self.files.skipped):
                    row = len(keys)
                    keys.append(legible(f"{self.files.stem(number)}/{sample.key}"))
                    files.append(number)
                    image, problem = self._image_of(sample.members)
                    members.append(image)
                    facts.add(sample.members, functools.partial(_bytes, file))
                    if problem := sample.problem or problem:
                        problems[row] = problem
        at, size = np.array(members, np.int64).reshape(-1, 2).T
        return _Listing(keys, np.array(files, np.int64), at, size, facts.problems() | problems, facts)

    def _image_of(self, members: dict[str, Member]) -> tuple[Member, str | None]:
        """The member with the image, and what is wrong about it."""
        found = [
            kind for kind in members if (kind in ENDINGS if self._ending is None else kind == self._ending.lower())
        ]
        if len(found) == 1:
            image = members[found[0]]
            too_large = f"its image has {image.bytes:,} bytes, more than the {MOST_BYTES:,} that are read"
            return image, too_large if image.bytes > MOST_BYTES else None
        if found:
            return NOTHING, f"two images, .{found[0]} and .{found[1]}: data.images says which"
        there = ", ".join(f".{kind}" for kind in list(members)[:5])
        return NOTHING, f"no image: it has {legible(there)}"

    @property
    def keys(self) -> list[str]:
        return self._listing.keys

    @functools.cached_property
    def given(self) -> Labels:
        listing = self._listing
        return Labels(listing.facts.values(), listing.keys, self.files.path, self._first, self._classes)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        return self.given.counted if self.classes else np.full(len(self.keys), -1, np.int64)

    @functools.cached_property
    def classes(self) -> list[str]:
        return self._usable.classes()

    @functools.cached_property
    def test(self) -> np.ndarray:
        return np.array(self.files.heldout, bool)[self._listing.files]

    @property
    def captions(self) -> list[str | None] | None:
        """The caption of each row, None for a row without; None if no row has one."""
        return self._listing.facts.captions()

    @functools.cached_property
    def _usable(self) -> Labels:
        """The labels of samples that can be used."""
        good = [row for row in range(len(self.keys)) if row not in self._listing.problems]
        return self.given._replace(values=self.given.values[good], keys=[self.keys[row] for row in good])

    def load(self, rows: np.ndarray, scratch: Path, report: Reporter) -> Loaded:
        listing = self._listing
        self.files.tell_splits(report)
        listing.facts.check(self.files.path, report, self._classes)
        if listing.facts.labelled:
            self._usable.check(report)
        outside = self.given.outside(rows, len(self.classes))
        unusable = outside | {
            place: listing.problems[row] for place, row in enumerate(rows.tolist()) if row in listing.problems
        }
        left = np.setdiff1d(np.arange(len(rows)), list(unusable))
        left = left[np.lexsort((listing.at[rows[left]], listing.files[rows[left]]))]  # in the order of the tars
        with own_limit():
            side = self.cut.image_size
            size = (side, side) if side else common_size(self._sample(), self.files.path)
            decoder = Decoder(self.cut, size, len(rows), scratch, report)
            decoder.set_aside(unusable)
            for number in range(len(self.files)):
                if len(places := left[listing.files[rows[left]] == number]):
                    with self.files.open(number) as file:
                        decoder.decode(places.tolist(), lambda place: self._image(file, int(rows[place])))
        return decoder.loaded(self.files.skipped)

    def digest(self, known: Path | None = None) -> dict[str, Any]:
        return self.files.digest(known)

    def _image(self, file: IO[bytes], row: int) -> io.BytesIO:
        return io.BytesIO(_bytes(file, Member(int(self._listing.at[row]), int(self._listing.bytes[row]))))

    def _sample(self) -> Iterator[io.BytesIO]:
        """Some images of all tars, whose shapes are looked at."""
        rows = [row for row in range(len(self.keys)) if row not in self._listing.problems]
        rows = rows[:: max(1, len(rows) // SHAPE_SAMPLE)]
        for number in range(len(self.files)):
            if own := [row for row in rows if self._listing.files[row] == number]:
                with self.files.open(number) as file:
                    yield from (self._image(file, row) for row in own)


def _bytes(file: IO[bytes], member: Member) -> bytes:
    found = os.pread(file.fileno(), member.bytes, member.at)
    if len(found) != member.bytes:
        raise StageError(f"{file.name}: was cut off while it was read: fetch it anew and run again")
    return found
