"""The downsampled-ImageNet layout: .npz files with `data` [N, 3 H W] uint8 and `labels` that start at 1."""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nfm.stages.sources.source import Loaded, box_average, class_names, digest_files, scratch_array
from nfm.stages.stage import Reporter, StageError, Stopped

UNREADABLE = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)


class Npz:
    """One .npz file, or a folder of `train_data_batch_*.npz`; `val_data.npz` is the test set if present."""

    name = "npz"

    def __init__(self, path: str | None, average: int = 1, classes: Sequence[str] | None = None):
        self.average = average
        self.files = _files(path)
        labels, keys, test, shapes = [], [], [], {}
        for file in self.files:
            values, shapes[file] = _labels(file), _image_shape(file)
            if len(values) != shapes[file][0]:
                raise StageError(f"{file}: {len(values)} labels for {shapes[file][0]} images: fetch the file anew")
            labels.append(values - 1)
            keys += [f"{file.stem}/{row:07d}" for row in range(len(values))]
            test.append(np.full(len(values), file.name == "val_data.npz"))
        self.image_shape = shapes[self.files[0]][1:]
        for file, shape in shapes.items():
            if shape[1:] != self.image_shape:
                raise StageError(f"{file}: images of {shape[1:]}, {self.files[0].name} has {self.image_shape}")
        self.starts = np.cumsum([0, *(len(part) for part in labels)])
        self.labels, self.keys, self.test = np.concatenate(labels), keys, np.concatenate(test)
        self.classes = class_names(classes, int(self.labels.max(initial=-1)) + 1)

    def load(self, rows: np.ndarray, scratch: Path, report: Reporter) -> Loaded:
        c, h, w = self.image_shape
        images = scratch_array(scratch, (len(rows), c, h // self.average, w // self.average))
        done = 0
        for file, start, stop in zip(self.files, self.starts[:-1], self.starts[1:]):
            if report.stopping:
                raise Stopped
            positions = np.flatnonzero((rows >= start) & (rows < stop))
            if len(positions):
                pixels = _member(file, "data")[rows[positions] - start].reshape(-1, c, h, w)
                images[positions] = box_average(pixels, self.average)
            done += len(positions)
            report.progress(done, len(rows), "images read")
        return Loaded(images)

    def digest(self, known: Path | None = None) -> dict[str, Any]:
        return digest_files(((file.name, file) for file in self.files), known=known)


def _files(path: str | None) -> list[Path]:
    if path is None:
        raise StageError('data.source = "npz" needs data.path: an .npz file, or a folder of train_data_batch_*.npz')
    root = Path(path)
    if root.is_file():
        return [root]
    batches = sorted(
        root.glob("train_data_batch_*.npz"), key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)]
    )
    if not batches:
        raise StageError(f"data.path = {path!r} is no .npz file and no folder that holds train_data_batch_*.npz")
    return batches + [file for file in (root / "val_data.npz",) if file.is_file()]


def _member(file: Path, name: str) -> np.ndarray:
    try:
        with np.load(file, allow_pickle=False) as members:
            return members[name]
    except UNREADABLE as error:
        raise StageError(f"{file}: array {name!r} cannot be read ({error}): fetch the file anew") from error


def _labels(file: Path) -> np.ndarray:
    labels = _member(file, "labels")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise StageError(f"{file}: labels are {labels.dtype} {labels.shape}, expected integers [N]")
    return labels.astype(np.int64)


def _image_shape(file: Path) -> tuple[int, int, int, int]:
    # Only the member's header is read: the pixels of one ImageNet64 file take 1.5 GB.
    try:
        with zipfile.ZipFile(file) as archive, archive.open("data.npy") as member:
            version = np.lib.format.read_magic(member)
            read_header = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read_header = np.lib.format.read_array_header_2_0
            shape, _, dtype = read_header(member)
    except UNREADABLE as error:
        raise StageError(f"{file}: array 'data' cannot be read ({error}): fetch the file anew") from error
    side = math.isqrt(shape[1] // 3) if len(shape) == 2 else 0
    if dtype != np.uint8 or not side or 3 * side * side != shape[1]:
        raise StageError(f"{file}: data is {dtype} {shape}, expected uint8 [N, 3 * side * side]")
    return shape[0], 3, side, side
