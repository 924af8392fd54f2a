"""Arrays in .npz files: the downsampled-ImageNet layout, and images or latents as [N, C, H, W].

`data` is either [N, 3 H W] uint8 with `labels` that start at 1 (downsampled ImageNet), or [N, C, H, W] of uint8,
float16 or float32, taken as it is, with `labels` that start at 0. Without `labels` the data has no classes.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nfm.stages.sources.source import Loaded, box_average, class_names, digest_files, scratch_array
from nfm.stages.stage import Reporter, StageError, Stopped

UNREADABLE = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)
DTYPES = ("uint8", "float16", "float32")
CHECKED_ROWS = 4096  # rows whose finiteness is looked at in one go


class Npz:
    """One .npz file, or a folder of `train_data_batch_*.npz`; `val_data.npz` is the test set if present."""

    name = "npz"

    def __init__(self, path: str | None, average: int = 1, classes: Sequence[str] | None = None):
        self.average = average
        self.files = _files(path)
        heads = [_header(file) for file in self.files]
        labels, keys, test = [], [], []
        for file, head in zip(self.files, heads):
            first = heads[0]
            if (head.shape, head.dtype, head.labelled) != (first.shape, first.dtype, first.labelled):
                raise StageError(f"{file}: holds {head}, {self.files[0].name} holds {first}: all files must agree")
            labels.append(_labels(file, head))
            keys += [f"{file.stem}/{row:07d}" for row in range(head.rows)]
            test.append(np.full(head.rows, file.name == "val_data.npz"))
        self.image_shape, self.dtype = heads[0].shape, heads[0].dtype
        if self.dtype != "uint8" and average != 1:
            raise StageError(f"data.average = {average}: {self.files[0]} holds {self.dtype}, only pixels are averaged")
        if classes and not heads[0].labelled:
            raise StageError(f"data.classes names classes, but {self.files[0]} has no labels: leave it out")
        self.starts = np.cumsum([0, *(len(part) for part in labels)])
        self.labels, self.keys, self.test = np.concatenate(labels), keys, np.concatenate(test)
        self.classes = class_names(classes, int(self.labels.max(initial=-1)) + 1)

    def load(self, rows: np.ndarray, scratch: Path, report: Reporter) -> Loaded:
        c, h, w = self.image_shape
        images = scratch_array(scratch, (len(rows), c, h // self.average, w // self.average), self.dtype)
        rejected: dict[int, str] = {}
        done = 0
        for file, start, stop in zip(self.files, self.starts[:-1], self.starts[1:]):
            if report.stopping:
                raise Stopped
            positions = np.flatnonzero((rows >= start) & (rows < stop))
            if len(positions):
                pixels = _member(file, "data")[rows[positions] - start].reshape(-1, c, h, w)
                rejected |= {int(positions[at]): reason for at, reason in _clear_nonfinite(pixels).items()}
                images[positions] = box_average(pixels, self.average)
            done += len(positions)
            report.progress(done, len(rows), "images read")
        return Loaded(images, dict(sorted(rejected.items())))

    def digest(self, known: Path | None = None) -> dict[str, Any]:
        return digest_files(((file.name, file) for file in self.files), known=known)


class _Header(NamedTuple):
    """What one file holds, read without its values."""

    rows: int
    shape: tuple[int, int, int]
    dtype: str
    labelled: bool
    first_label: int

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape} {'with' if self.labelled else 'without'} labels"


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


def _labels(file: Path, head: _Header) -> np.ndarray:
    """Labels counted from 0; -1 where there are none."""
    if not head.labelled:
        return np.full(head.rows, -1, np.int64)
    labels = _member(file, "labels")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise StageError(f"{file}: labels are {labels.dtype} {labels.shape}, expected integers [N]")
    if len(labels) != head.rows:
        raise StageError(f"{file}: {len(labels)} labels for {head.rows} images: fetch the file anew")
    return labels.astype(np.int64) - head.first_label


def _header(file: Path) -> _Header:
    # Only the member's header is read: the pixels of one ImageNet64 file take 1.5 GB.
    try:
        with zipfile.ZipFile(file) as archive, archive.open("data.npy") as member:
            version = np.lib.format.read_magic(member)
            read_header = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read_header = np.lib.format.read_array_header_2_0
            shape, _, dtype = read_header(member)
            labelled = "labels.npy" in archive.namelist()
    except UNREADABLE as error:
        raise StageError(f"{file}: array 'data' cannot be read ({error}): fetch the file anew") from error
    if len(shape) == 4 and dtype.name in DTYPES and min(shape[1:]) > 0:
        rows, channels, height, width = shape
        return _Header(rows, (channels, height, width), dtype.name, labelled, 0)
    side = math.isqrt(shape[1] // 3) if len(shape) == 2 else 0
    if dtype != np.uint8 or not side or 3 * side * side != shape[1]:
        raise StageError(
            f"{file}: data is {dtype} {shape}, expected uint8 [N, 3 * side * side], or [N, C, H, W] of "
            f"{', '.join(DTYPES)}"
        )
    return _Header(shape[0], (3, side, side), "uint8", labelled, 1)


def _clear_nonfinite(values: np.ndarray) -> dict[int, str]:
    """Zeroes, in place, the rows of [n, C, H, W] that hold NaN or infinity; their reasons by row."""
    if values.dtype == np.uint8:
        return {}
    reasons: dict[int, str] = {}
    for start in range(0, len(values), CHECKED_ROWS):
        part = values[start : start + CHECKED_ROWS]
        bad = part.shape[1] * part.shape[2] * part.shape[3] - np.isfinite(part).sum(axis=(1, 2, 3))
        for row in np.flatnonzero(bad):
            reasons[start + int(row)] = f"{bad[row]} of {part[row].size} values are not finite"
            part[row] = 0
    return reasons
