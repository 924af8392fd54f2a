"""A folder of class folders of images, optionally below train/ and test/ (or val/), decoded by Pillow."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nfm.stages.sources.source import Loaded, box_average, digest_files, scratch_array
from nfm.stages.stage import Reporter, StageError, Stopped

TEST_FOLDERS = ("test", "val")
SHAPE_SAMPLE = 256
DECODE_BATCH = 512


class ImageFolder:
    """Image files by class: keys are paths below the folder, labels the classes' places in sorted order.

    With `image_size`, the central square of every image is resized to that edge (bicubic, antialiased).
    Without it, images keep their pixels, and the commonest shape is the one that all must have.
    """

    name = "images"

    def __init__(
        self,
        path: str | None,
        image_size: int | None = None,
        channels: int = 3,
        average: int = 1,
        classes: Sequence[str] | None = None,
        threads: int = 0,
    ):
        self.root = _root(path)
        self.image_size, self.channels, self.average = image_size, channels, average
        self.threads = threads or os.cpu_count() or 1
        train, test = _parts(self.root)
        files_of = {
            folder: sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
            for part in (train, test)
            if part
            for folder in _class_folders(part)
        }
        # The digest is of files, so a folder without any must not count.
        found = {folder.name for folder, files in files_of.items() if files}
        self.classes = sorted(found) if classes is None else list(classes)
        if unknown := sorted(found - set(self.classes)):
            raise StageError(f"{self.root}: class folders {unknown[:5]} are not in data.classes: name every class")
        self.paths: list[Path] = []
        labels: list[int] = []
        tests: list[bool] = []
        for folder, files in files_of.items():
            self.paths += files
            labels += [self.classes.index(folder.name)] * len(files) if files else []
            tests += [folder.parent == test] * len(files)
        if not self.paths:
            raise StageError(f"data.path = {path!r}: no image file in a class folder here (expected CLASS/IMAGE.png)")
        self.keys = [file.relative_to(self.root).as_posix() for file in self.paths]
        self.labels, self.test = np.array(labels, np.int64), np.array(tests, bool)

    def load(self, rows: np.ndarray, scratch: Path, report: Reporter) -> Loaded:
        from PIL import Image, UnidentifiedImageError

        height, width = self._size()
        images = scratch_array(scratch, (len(rows), self.channels, height // self.average, width // self.average))
        rejected: dict[int, str] = {}

        def decode(position: int) -> None:
            try:
                with Image.open(self.paths[rows[position]]) as opened:
                    pixels = self._pixels(opened, height, width)
            except _MisfitError as error:
                rejected[position] = str(error)
            except UnidentifiedImageError:
                rejected[position] = "not an image that Pillow reads"
            except (Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError) as error:
                rejected[position] = f"unreadable: {error}".replace(str(self.root) + os.sep, "")
            else:
                images[position] = box_average(pixels[None], self.average)[0]

        with ThreadPoolExecutor(self.threads) as pool:
            for start in range(0, len(rows), DECODE_BATCH):
                if report.stopping:
                    raise Stopped
                stop = min(start + DECODE_BATCH, len(rows))
                list(pool.map(decode, range(start, stop)))
                report.progress(stop, len(rows), "images read")
        return Loaded(images, dict(sorted(rejected.items())))

    def digest(self, known: Path | None = None) -> dict[str, Any]:
        return digest_files(zip(self.keys, self.paths), known=known)

    def _size(self) -> tuple[int, int]:
        if self.image_size:
            return self.image_size, self.image_size
        from PIL import Image

        sizes: Counter[tuple[int, int]] = Counter()
        for path in self.paths[:: max(1, len(self.paths) // SHAPE_SAMPLE)]:
            try:
                with Image.open(path) as opened:
                    sizes[opened.size] += 1
            except (Image.DecompressionBombError, OSError, SyntaxError, ValueError):
                continue  # counted and set aside when it is decoded
        if not sizes:
            raise StageError(f"{self.root}: none of the files tried is an image that Pillow reads")
        width, height = max(sizes, key=lambda size: (sizes[size], size))
        return height, width

    def _pixels(self, opened: Any, height: int, width: int) -> np.ndarray:
        """One decoded image as [C, H, W] uint8."""
        from PIL import Image

        image = opened.convert("RGB" if self.channels == 3 else "L")
        if self.image_size is None and image.size != (width, height):
            raise _MisfitError(f"{image.width}x{image.height} pixels, the others {width}x{height}: set data.image_size")
        if self.image_size is not None:
            side = min(image.size)
            if side < self.image_size:
                raise _MisfitError(
                    f"{image.width}x{image.height} pixels, smaller than data.image_size = {self.image_size}"
                )
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side))
            image = square.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(image, np.uint8).reshape(height, width, self.channels).transpose(2, 0, 1)


class _MisfitError(ValueError):
    """An image that decodes but does not fit; its message is the reason in the table."""


def _root(path: str | None) -> Path:
    if path is None:
        raise StageError('data.source = "images" needs data.path, a folder of class folders')
    if not Path(path).is_dir():
        raise StageError(f"data.path = {path!r} is no folder: name one that holds a folder for each class")
    return Path(path)


def _parts(root: Path) -> tuple[Path, Path | None]:
    """The folder of the training classes, and that of the test set's if there is one."""
    if not (root / "train").is_dir():
        return root, None
    return root / "train", next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)


def _class_folders(part: Path) -> list[Path]:
    return sorted(folder for folder in part.iterdir() if folder.is_dir() and not folder.name.startswith("."))
