"""Arrays in .npz files: the downsampled-ImageNet layout, and images or latents as [N, C, H, W].

`data` is either [N, 3 H W] uint8 with `labels` that start at 1 (downsampled ImageNet), or [N, C, H, W] of uint8,
float16 or float32, used unchanged, with `labels` that start at 0. Without `labels` the data has no classes. Settings
can name other arrays, another order of axes and another first label.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nfm.stages.base import Reporter, StageError, Stopped, Unfit
from nfm.stages.data.reading.arrays import Array, arrays_of, pieces, read_whole
from nfm.stages.data.reading.axes import Axes, channels_first, check_axes, image_shape
from nfm.stages.data.reading.labels import Labels, whole_numbers
from nfm.stages.data.reading.npz_files import check_folder, files_of
from nfm.stages.data.reading.values import Values, clear_nonfinite
from nfm.stages.data.source import Loaded, box_average, digest_files, keys_of, scratch_array
from nfm.storage.errors import by

DTYPES = ("uint8", "float16", "float32")
IMAGES, LABELS = "data", "labels"


class Npz:
    """One .npz file, or a folder of `train_data_batch_*.npz`. `val_data.npz` is the test set if it exists.

    `images` and `labels` name the arrays; `labels` "" means none.
    """

    name = "npz"

    def __init__(
        self,
        path: str | None,
        average: int = 1,
        classes: Sequence[str] | None = None,
        images: str | None = None,
        labels: str | None = None,
        axes: Axes | None = None,
        first_label: int | None = None,
    ):
        self.average, self.axes, self.unnamed_labels = average, axes, labels is None
        self.path, self.files = path, files_of(path)
        self.names = keys_of(self.files[0].parent, [file.name for file in self.files])
        self.heads = heads = [_header(file, images or IMAGES, labels, axes) for file in self.files]
        first = heads[0]
        parts, keys, test = [], [], []
        for file, name, head in zip(self.files, self.names, heads):
            if head.kind != first.kind:
                raise StageError(f"{file}: holds {head}, {self.files[0].name} holds {first}: all files must agree")
            parts.append(_labels(file, head))
            keys += [f"{Path(name).stem}/{row:07d}" for row in range(head.rows)]
            test.append(np.full(head.rows, file.name == "val_data.npz" and len(self.files) > 1))
        self.image_shape, self.dtype = first.shape, first.dtype
        if self.dtype != "uint8" and average != 1:
            raise Unfit(f"data.average = {average}: {self.files[0]} holds {self.dtype}, only pixels are averaged")
        for field, value in (("classes", classes or None), ("first_label", first_label)):
            if value is not None and first.labels is None:
                raise Unfit(f"data.{field} is of labels, but {self.files[0]} has no labels: leave it out")
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        if first_label is None:
            first_label = 1 if len(first.images.shape) == 2 and first.labels is not None else 0
        self.where = str(self.files[0] if len(self.files) == 1 else self.files[0].parent)
        self.given = Labels(np.concatenate(parts), keys, self.where, first_label, classes)
        self.keys, self.test, self.classes = keys, np.concatenate(test), self.given.classes()
        self.labels = self.given.counted if self.classes else np.full(len(keys), -1, np.int64)

    def load(self, rows: np.ndarray, scratch: Path, report: Reporter) -> Loaded:
        self._check(report)
        c, h, w = self.image_shape
        images = scratch_array(scratch, (len(rows), c, h // self.average, w // self.average), self.dtype)
        rejected: dict[int, str] = {}
        values, done = Values(), 0
        report.progress(done, len(rows), "images read")
        for file, head, start in zip(self.files, self.heads, self.starts.tolist()):
            # The positions in `images` of this file's rows, and the rows themselves, in ascending order.
            places = np.flatnonzero((rows >= start) & (rows < start + head.rows))
            places = places[np.argsort(rows[places], kind="stable")]
            own = rows[places] - start
            for at, piece in pieces(file, head.images, scratch) if len(own) else ():
                if report.stopping:
                    raise Stopped
                here = slice(*np.searchsorted(own, [at, at + len(piece)]))
                taken = channels_first(piece[own[here] - at], self.image_shape, self.axes)
                reasons = clear_nonfinite(taken)
                rejected |= {int(places[here][row]): reason for row, reason in reasons.items()}
                values.add(np.delete(taken, list(reasons), axis=0) if reasons else taken)
                images[places[here]] = box_average(taken, self.average)
                done += len(taken)
                report.progress(done, len(rows), "images read")
        if told := values.remark(self.dtype):
            report.say(f"{self.where}: {self.heads[0].images.name} is {told}")
        return Loaded(images, dict(sorted((self.given.outside(rows, len(self.classes)) | rejected).items())))

    def digest(self, known: Path | None = None) -> dict[str, Any]:
        return digest_files(zip(self.names, self.files), known=known)

    def _check(self, report: Reporter) -> None:
        """Refuses doubtful data when it is made, so that older data sets keep their names. Reports what is unusual."""
        check_folder(self.path, self.files, report)
        if told := check_axes(self.heads[0].images.shape, self.axes, f"{self.files[0]}: {self.heads[0].images}"):
            report.say(told)
        for file, head in zip(self.files, self.heads):
            if not head.rows:
                raise StageError(f"{file}: {head.images} holds no image: fetch the file anew, or take it away")
            if self.unnamed_labels and head.labels is None and (others := head.like_labels()):
                shown = ", ".join(map(str, others))
                raise Unfit(
                    f"{file}: no array {LABELS!r}, but {shown}: set data.labels = {_quoted(others[0].name)} if those "
                    'are the labels, or data.labels = "" for images without labels'
                )
            if others := [array for array in head.others if array.shape[1:] == head.images.shape[1:]]:
                report.say(
                    f"{file}: not read: {', '.join(map(str, others))}. A test set is a file val_data.npz beside "
                    "train_data_batch_1.npz"
                )
        if self.heads[0].labels is not None:
            self.given.check(report)


class _Header(NamedTuple):
    """What one file contains, read without its values."""

    images: Array
    labels: Array | None
    others: list[Array]
    shape: tuple[int, int, int]

    @property
    def rows(self) -> int:
        return self.images.shape[0]

    @property
    def dtype(self) -> str:
        return self.images.dtype.name

    @property
    def kind(self) -> tuple[Any, ...]:
        """What all files must have in common."""
        return self.images.shape[1:], self.dtype, self.labels is not None

    def like_labels(self) -> list[Array]:
        """Arrays that may be labels under another name: one or a few values for each image, or whole
        numbers in a row.
        """
        return [
            array
            for array in self.others
            if (array.shape[:1] == (self.rows,) and len(array.shape) <= 2)
            or (len(array.shape) == 1 and array.dtype.kind in "iuUS")
        ]

    def __str__(self) -> str:
        return f"{self.dtype} {by(self.images.shape[1:])} {'without' if self.labels is None else 'with'} labels"


def _header(file: Path, images: str, labels: str | None, axes: Axes | None) -> _Header:
    held = arrays_of(file)
    there = ", ".join(map(str, held.values())) or "no array"
    if (array := held.get(images)) is None:
        several = [other for other in held.values() if len(other.shape) > 1]
        likely = max(several, key=lambda other: other.row_bytes * other.shape[0], default=None)
        remedy = f"set data.images = {_quoted(likely.name)}" if likely else "save the images as an array of it"
        raise Unfit(f"{file}: no array {images!r} for the images; it holds {there}: {remedy}")
    if labels and labels not in held:
        raise Unfit(f"{file}: no array {labels!r}, which data.labels names; it holds {there}")
    where = f"{file}: {array}"
    if array.dtype.name not in DTYPES or (len(array.shape) == 2 and array.dtype != np.uint8):
        raise StageError(
            f"{where}, expected uint8 [N, 3 * side * side], or [N, C, H, W] of {', '.join(DTYPES)}; {_remedy(array)}"
        )
    own = held.get(LABELS if labels is None else labels)
    others = [other for name, other in held.items() if other not in (array, own)]
    return _Header(array, own, others, image_shape(array.shape, axes, where))


def _remedy(array: Array) -> str:
    name, kind = array.name, array.dtype.kind
    if array.dtype.hasobject:
        return "Python objects are never unpickled: np.stack images of one size and save that"
    if kind == "b":
        return f"save {name}.astype(np.uint8) * 255"
    if kind in "iu":
        wide = f", ({name} >> 8).astype(np.uint8) if they go up to 65535" if array.dtype.str[1:] == "u2" else ""
        return f"save {name}.astype(np.uint8) if they are pixels from 0 to 255{wide}"
    if kind == "f":
        return f"save {name}.astype(np.float32) if they are latents" + (
            ", reshaped to [N, C, H, W]" if len(array.shape) == 2 else ""
        )
    return "save it as one of those"


def _labels(file: Path, head: _Header) -> np.ndarray:
    """int64 [N] as in the file; -1 if there are no labels."""
    if head.labels is None:
        return np.full(head.rows, -1, np.int64)
    # The header is checked first, so that an array which cannot be labels is not read. Of fractions the remedy depends
    # on the values.
    if head.labels.dtype.kind != "f" or head.labels.shape != (head.rows,):
        whole_numbers(np.broadcast_to(np.zeros((), head.labels.dtype), head.labels.shape), head.rows, str(file))
    return whole_numbers(read_whole(file, head.labels), head.rows, str(file))


def _quoted(name: str) -> str:
    return f'"{name}"'
