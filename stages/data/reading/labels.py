"""Labels as a file has them: which ones are used, how they are counted from 0, and what is refused or reported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nfm.stages.base import Reporter, StageError, Unfit
from nfm.storage.errors import by

MOST_CLASSES = 10**6  # classes of a data set
FEW_EMPTY = 16  # fewer numbers without an image are not reported: part of a small data set may lack as many
SHOWN = 8
NO_LABEL = -1  # what data sets give an image without a label, such as those of a hidden test set

RENUMBER = "renumber them (np.unique(labels, return_inverse=True)[1])"


class Labels(NamedTuple):
    """Integers [N] as in the file; `first` is the number of the first class, `names` are the class names of
    the config.
    """

    values: np.ndarray
    keys: Sequence[str]
    where: str
    first: int = 0
    names: Sequence[str] | None = None

    @property
    def counted(self) -> np.ndarray:
        """The labels counted from 0, int64 [N]. Those before the first class are below 0."""
        return self.values - self.first

    def classes(self) -> list[str]:
        """The class names of the config, else the numbers from 0. Raises Unfit if there are too many for memory."""
        if self.names:
            return list(self.names)
        count = int(self.values.max(initial=self.first - 1)) - self.first + 1
        if count > MOST_CLASSES:
            row = int(self.values.argmax())
            raise Unfit(f"{self.where}: {self.keys[row]} has label {self.values[row]}, {self._too_far()}")
        return [str(label) for label in range(count)]

    def check(self, report: Reporter) -> None:
        """Refuses numbers that cannot be classes, and reports classes without an image."""
        labels = self.values[self.values != NO_LABEL]
        if self.names:
            if len(self.values) and not len(labels) and self.first != NO_LABEL:
                raise Unfit(
                    f"{self.where}: every label is {NO_LABEL}, which means no label, but data.classes names "
                    f"{len(self.names)} classes: leave it out"
                )
            return
        there = np.unique(self.values[self.values >= self.first])
        if not len(there):
            if len(labels):
                raise Unfit(
                    f"{self.where}: labels run from {labels.min()} to {labels.max()}, classes are counted "
                    f"from {self.first}: set data.first_label = {labels.min()}"
                )
            if len(self.values):
                report.say(f"{self.where}: every label is {NO_LABEL} or null: taken as images without labels")
            return
        low, high = int(there[0]), int(there[-1])
        if low > self.first:
            far, odd = _far_above(there), self._odd(there)
            raise Unfit(
                f"{self.where}: labels run from {low} to {there[-1 - len(far)]}, expected to begin with {self.first}, "
                f"and a class without images would be made: set data.first_label = {low}, or name every class, from "
                f"{self.first} on, with data.classes" + (f". Then leave out {odd}, far from the others" if odd else "")
            )
        empty = high - low + 1 - len(there)
        if _far_above(there):
            row = int(self.values.argmax())
            raise Unfit(
                f"{self.where}: {self.keys[row]} has label {high}, {self._too_far()}. "
                "If it marks images without a class, leave those images out"
            )
        if empty:
            gaps = np.setdiff1d(np.arange(low, high + 1), there)
            shown = ", ".join(map(str, gaps[:SHOWN])) + (", ..." if empty > SHOWN else "")
            report.say(f"{self.where}: {empty} of {high - low + 1} classes have no image: labels {shown}")

    def _odd(self, there: np.ndarray) -> str:
        """Labels before the first class or far above the others, each with its number of images."""
        odd = [*np.unique(self.values[self.values < self.first]), *_far_above(there)]
        images = [f"label {label} ({(self.values == label).sum()} of {len(self.values)} images)" for label in odd]
        return ", ".join(images[:SHOWN]) + (", ..." if len(images) > SHOWN else "")

    def _too_far(self) -> str:
        there = np.unique(self.values)
        below = f", the next one below is {there[-2]}" if len(there) > 1 else ""
        return (
            f"with {len(there)} different labels in all{below}: a class would be made of every number up to it. "
            f"Name the classes with data.classes, or {RENUMBER}"
        )

    def outside(self, rows: np.ndarray, count: int) -> dict[int, str]:
        """The positions in `rows` whose label is not one of `count` classes, with the reason."""
        values = self.values[rows]
        if not count:
            places = np.flatnonzero(values != NO_LABEL)
        else:
            places = np.flatnonzero((values < self.first) | (values >= self.first + count))
        return {int(place): self._reason(int(values[place]), count) for place in places}

    def _reason(self, label: int, count: int) -> str:
        if label == NO_LABEL:
            return (
                f"label {label}, which means no label, among images with labels; take it out (if it is a test "
                "split without labels, let data.path name the training files alone), or take all images without labels "
                '(data.labels = "")'
            )
        reason = f"label {label} is outside the {count} classes, labels {self.first} to {self.first + count - 1}"
        return reason if label >= self.first else f"{reason}; data.first_label = {label} if that is where they begin"


def _far_above(there: np.ndarray) -> list[int]:
    """The highest of these sorted labels, if more numbers below them are empty than used."""
    end = len(there)
    while end > 1 and there[end - 1] - there[0] + 1 - end > max(end, FEW_EMPTY):
        end -= 1
    return [int(label) for label in there[end:]]


def whole_numbers(values: np.ndarray, rows: int, where: str) -> np.ndarray:
    """Labels as int64 [N]. Raises StageError, with the remedy, unless there is one whole number for each row."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    is_ = f"{where}: labels are {values.dtype} {by(values.shape)}, expected integers, one an image"
    if values.ndim == 2 and values.dtype.kind in "biuf":
        raise StageError(f"{is_}; of one-hot rows, save labels.argmax(1)")
    if values.dtype.kind in "US":
        raise Unfit(
            f"{is_}: save the labels of `names, labels = np.unique(labels, return_inverse=True)`, and set data.classes "
            "to the names"
        )
    if values.ndim == 1 and values.dtype.kind == "f" and (odd := np.flatnonzero(values != np.rint(values))).size:
        raise StageError(
            f"{is_}; {values[odd[0]]} in row {odd[0]} is no class: save the number of each image's class, from 0 on"
        )
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise StageError(f"{is_}: save labels.astype(np.int64), one a row")
    if len(values) != rows:
        raise StageError(f"{where}: {len(values)} labels for {rows} images: save as many, or fetch the file anew")
    if len(values) and int(values.max()) > np.iinfo(np.int64).max:
        raise StageError(f"{where}: label {values.max()} in row {values.argmax()} is no class: {RENUMBER}")
    return values.astype(np.int64)
