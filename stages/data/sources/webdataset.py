"""Tars of samples as WebDataset's own writer and img2dataset make them: an image and what is known of it by one key.

docs/data.md says what is read, what is set aside, and why.
"""

from __future__ import annotations

import functools
import io
import os
from collections import Counter
from collections.abc import Collection, Iterator
from typing import IO

import numpy as np

from nfm.stages.base import Reporter, StageError, Unfit
from nfm.stages.data.reading.sample_facts import Facts
from nfm.stages.data.reading.tar_samples import Member, samples
from nfm.stages.data.sources.encoded import EncodedImages, Listing, Piece
from nfm.storage.errors import legible

ENDINGS = ("jpg", "jpeg", "png", "webp")
NOTHING = Member(0, 0)
SHOWN, MOST_KINDS = 5, 1000
MOST_BYTES = 1 << 30  # of an encoded image


class WebDataset(EncodedImages):
    """One tar, those of a folder, or those of a pattern. Keys are the name of the tar and the sample's key in it.

    `images` is the ending of the image's member where a sample has several. `labels` and `captions` are fields of the
    `.json` member, by default the `.cls` and the `.txt` member; "" for none.
    """

    name, ending = "webdataset", ".tar"

    def listed(self) -> Listing:
        images, labels, captions = self._wanted
        endings = ENDINGS if images is None else (images.lower().removeprefix("."),)
        facts, sizes = Facts(labels, captions, self._given_classes, self._first or 0), []
        keys: list[str] = []
        files: list[int] = []
        places: list[int] = []
        problems: dict[int, str] = {}
        found, others = 0, Counter[str]()  # samples with the image's member, and endings of members
        for number, path in enumerate(self.files.paths):
            with self.files.open(number) as file:
                for sample in samples(file, path, self.files.skipped):
                    image, problem = _image_of(sample.members, endings)
                    found += any(kind in endings for kind in sample.members)
                    others.update(list(sample.members)[:SHOWN] if len(others) < MOST_KINDS else ())
                    if problem := sample.problem or problem:
                        problems[len(keys)] = problem
                    facts.add(sample.members, functools.partial(_bytes, file))
                    keys.append(legible(f"{self.files.stem(number)}/{sample.key}"))
                    files.append(number)
                    places.append(image.at)
                    sizes.append(image.bytes)
        if images is not None and keys and not found:
            told = ", ".join(f".{legible(kind)}" for kind, _ in others.most_common(SHOWN))
            raise Unfit(f"data.images = {images!r}: no sample of {self.files.path} has such a member; there are {told}")
        facts.check(self.files.path)
        self._facts = facts
        problems = facts.problems() | problems
        return Listing(
            keys, np.array(files, np.int64), np.array(places, np.int64), problems, facts.labels(), facts.captions(),
            sizes=np.array(sizes, np.int64),
        )  # fmt: skip

    def pieces(self, number: int, places: np.ndarray, sizes: np.ndarray) -> Iterator[Piece]:
        members = [Member(at, size) for at, size in zip(places.tolist(), sizes.tolist())]
        with self.files.open(number) as file:
            yield slice(0, len(members)), lambda at: io.BytesIO(_bytes(file, members[at]))

    def tell(self, report: Reporter) -> None:
        self._facts.tell(self.files.path, report)


def _image_of(members: dict[str, Member], endings: Collection[str]) -> tuple[Member, str | None]:
    """The member with the image, and what is wrong about it."""
    found = [kind for kind in members if kind in endings]
    if len(found) == 1:
        image = members[found[0]]
        too_large = f"its image has {image.bytes:,} bytes, more than the {MOST_BYTES:,} that are read"
        return image, too_large if image.bytes > MOST_BYTES else None
    if found:
        return NOTHING, f"two images, .{found[0]} and .{found[1]}: data.images says which"
    there = ", ".join(f".{kind}" for kind in list(members)[:SHOWN])
    return NOTHING, f"no image: it has {legible(there)}; data.images names another ending"


def _bytes(file: IO[bytes], member: Member) -> bytes:
    found = os.pread(file.fileno(), member.bytes, member.at)
    if len(found) != member.bytes:
        raise StageError(f"{file.name}: was cut off while it was read: fetch it anew and run again")
    return found
