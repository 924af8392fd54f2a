"""Encoded images to pixels on several threads: one way for every source, so that the same bytes give the same pixels.

What cannot be decoded or used is set aside with a reason; docs/data.md has the table.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nfm.stages.base import StageError, Unfit
from nfm.stages.data.source import Loaded, Stopping, box_average, scratch_array
from nfm.storage.errors import legible
from nfm.storage.files.parallel import parallel

Crop = Literal["centre", "adm"]
Opener = Callable[[int], Any]  # position -> what Pillow opens: a path, or a file object

SHAPE_SAMPLE = 256  # images whose shape is looked at if none is given
DECODE_BATCH = 512


@dataclass(frozen=True)
class Cut:
    """How an image becomes pixels: the settings of [data] that all sources of encoded images share."""

    image_size: int | None = None
    channels: int = 3
    average: int = 1
    background: str = "white"
    crop: Crop = "centre"
    threads: int = 0

    def __post_init__(self) -> None:
        if self.crop != "centre" and self.image_size is None:
            raise Unfit(f'data.crop = "{self.crop}" cuts to data.image_size, which is not set: set it, or leave it out')


def shape_of(config: Any) -> tuple[int, int, int] | None:
    """[C, H, W] of images that are cut to `data.image_size`; None without one."""
    if config.image_size is None or config.image_size % config.average:
        return None
    side = config.image_size // config.average
    return config.channels, side, side


def own_limit() -> AbstractContextManager[None]:
    """Lets Pillow open images of up to MOST_PIXELS without a warning; for all threads, so enter it before they start"""
    from nfm.stages.data.reading import pixels  # Pillow belongs to an extra

    return pixels.own_limit()


def common_size(openable: Iterable[Any]) -> tuple[int, int] | None:
    """(height, width) of the most frequent shape of these images; None if none can be read."""
    from PIL import Image

    from nfm.stages.data.reading.pixels import upright_size

    sizes: Counter[tuple[int, int]] = Counter()
    for image in openable:
        try:
            with Image.open(image) as opened:
                sizes[upright_size(opened)] += 1
        except Exception:  # counted and set aside when it is decoded
            continue
    if not sizes:
        return None
    width, height = max(sizes, key=lambda size: (sizes[size], size))
    return height, width


def size_of(cut: Cut, openable: Callable[[int], Iterable[Any]], total: int) -> tuple[int, int]:
    """(height, width) of all images. `openable(n)` gives every n-th of `total` images.

    If no image can be read at all, every one is set aside with its reason, and the size does not matter.
    """
    if cut.image_size:
        return cut.image_size, cut.image_size
    step = max(1, total // SHAPE_SAMPLE)
    found = common_size(openable(step)) or (common_size(openable(1)) if step > 1 else None)
    return found or (cut.average, cut.average)


class Decoder:
    """Decodes images into an array in `scratch`, in any order and some at a time. `loaded` gives the result.

    `size` is the (height, width) of all images. `root` is taken out of the reasons for which images are set aside.
    Raises InterruptedError soon after `stopping` became true.
    """

    def __init__(self, cut: Cut, size: tuple[int, int], total: int, scratch: Path, stopping: Stopping, root: Any = ""):
        self.cut, self.size, self.stopping, self.root = cut, size, stopping, root
        height, width = size
        self.images = scratch_array(scratch, (total, cut.channels, height // cut.average, width // cut.average))
        self.rejected: dict[int, str] = {}
        self.counts: Counter[str] = Counter()

    def set_aside(self, reasons: dict[int, str]) -> None:
        """Sets positions aside that are not decoded at all."""
        self.rejected |= reasons

    def decode(self, positions: Sequence[int], opener: Opener) -> None:
        """Decodes the images at these positions."""
        threads = self.cut.threads or os.cpu_count() or 1
        for start in range(0, len(positions), DECODE_BATCH):
            if self.stopping():
                raise InterruptedError
            some = positions[start : start + DECODE_BATCH]
            for notes in parallel(lambda position: self._decode(position, opener), some, threads):
                self.counts.update(notes)

    def loaded(self) -> Loaded:
        """The images, and what was decided on the way."""
        return Loaded(self.images, dict(sorted(self.rejected.items())), notes=dict(sorted(self.counts.items())))

    def _decode(self, position: int, opener: Opener) -> list[str]:
        """Notes about decisions on the way; none if the image is set aside."""
        from PIL import Image, UnidentifiedImageError

        from nfm.stages.data.reading.pixels import MOST_PIXELS, MisfitError, converted, fitted

        cut = self.cut
        try:
            with Image.open(opener(position)) as opened:
                image, notes = converted(opened, cut.channels, cut.background)
                pixels, more = fitted(image, self.size, cut.image_size, cut.crop)
        except (MemoryError, StageError):
            raise
        except MisfitError as error:
            self.rejected[position] = str(error)
        except Image.DecompressionBombError:
            self.rejected[position] = f"more than {MOST_PIXELS:,} pixels, the most that are read: make it smaller"
        except UnidentifiedImageError:
            self.rejected[position] = "not an image that Pillow reads"
        except Exception as error:  # a broken file may make a Pillow plugin raise anything
            self.rejected[position] = legible(f"unreadable: {error}".replace(f"{self.root}{os.sep}", ""))
        else:
            self.images[position] = box_average(pixels[None], cut.average)[0]
            return notes + more
        return []
