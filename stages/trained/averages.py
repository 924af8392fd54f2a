"""The moving averages of a finished student: the files that they are in, and the choice of one by its name.

A student is sampled with `weights.safetensors`, the average of its config's `ema`. Others are named:

    0.05            the average of this relative width at the end of training, of `student.emas`
    0.05@120000     the same when 120,000 pairs were seen, of `student.snapshots`
    posthoc:0.07    of a width that was not tracked: a combination of all snapshots and of the last averages
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nfm.stages.base import StageError, Unfit
from nfm.stages.trained.training import WEIGHTS, read_weights
from nfm.storage.files import atomic
from nfm.trainers.training.profiles import WIDEST, Profile, combination

if TYPE_CHECKING:
    from torch import Tensor

SNAPSHOTS = "snapshots"
POSTHOC = "posthoc:"
LARGEST_ERROR = 0.1  # of the profile of a combination, relative
_NAME = re.compile(rf"({POSTHOC})?(\d*\.?\d+)(?:@(\d+))?")
_FILE = re.compile(r"ema-([\d.]+)(?:@(\d+))?\.safetensors")


class Name(NamedTuple):
    """A moving average: its relative width, when it was taken (None: at the end), and whether it is to be combined."""

    width: float
    seen: int | None = None
    posthoc: bool = False

    def __str__(self) -> str:
        return f"{POSTHOC if self.posthoc else ''}{self.width}{'' if self.seen is None else f'@{self.seen}'}"


def parse(text: str) -> Name:
    """The average of this name. Raises ValueError for a text that names none."""
    found = _NAME.fullmatch(text)
    if found is None or not 0 < float(found[2]) <= WIDEST or (found[1] and found[3]):
        raise ValueError(
            f'{text!r} names no moving average; name one by its relative width, "0.05", by width and pairs seen, '
            f'"0.05@120000", or "{POSTHOC}0.07" for a width in (0, {WIDEST}] that was not tracked'
        )
    return Name(float(found[2]), int(found[3]) if found[3] else None, found[1] is not None)


def file_of(width: float, seen: int | None = None) -> str:
    """The file of an average, in the folder of its student."""
    return f"ema-{width}.safetensors" if seen is None else f"{SNAPSHOTS}/ema-{width}@{seen}.safetensors"


def files_of(folder: Path) -> dict[Name, str]:
    """The files of all averages in a folder: those of the end, then snapshots in the order of their making."""
    found: dict[Name, str] = {}
    for path in (*folder.glob("ema-*"), *(folder / SNAPSHOTS).glob("ema-*")):
        if (parts := _FILE.fullmatch(path.name)) is not None:
            name = Name(float(parts[1]), int(parts[2]) if parts[2] else None)
            found[name] = str(path.relative_to(folder))
    return dict(sorted(found.items(), key=lambda one: (one[0].seen is not None, one[0].seen, one[0].width)))


def read(folder: Path, ema: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a finished student, or of the average `ema` of it, and what builds its network again.

    Raises Unfit for an average that it does not have, and for a combination that would not be the average asked for.
    """
    if ema is None:
        return read_weights(folder)
    name, there = parse(ema), files_of(folder)
    if name.posthoc:
        return _combined(folder, name, there)
    if name not in there:
        raise Unfit(f"{folder}: no moving average {name} in it; {_told(there)}")
    return read_weights(folder, there[name])


def _combined(folder: Path, name: Name, there: Mapping[Name, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The least squares combination of all averages, summed in float64 and stored as they are."""
    if not there:
        raise Unfit(f"{folder}: no moving averages to combine into {name}; {_told(there)}")
    end = atomic.read_json(folder / "manifest.json")["metrics"]["pairs_seen"]
    known = [Profile(end if one.seen is None else one.seen, one.width) for one in there]
    weights, error = combination(known, Profile(end, name.width))
    if error > LARGEST_ERROR:
        raise Unfit(
            f"{folder}: {name} cannot be made of its {len(known)} averages: their profile would be wrong by {error:.0%}; "
            f"name a width nearer to {', '.join(sorted({str(one.width) for one in there}))}, or train it with more "
            "student.snapshots"
        )
    total: dict[str, Tensor] = {}
    for file, weight in zip(there.values(), weights, strict=True):
        state, architecture = read_weights(folder, file)
        for key, value in state.items():
            if value.is_floating_point():
                total[key] = total.get(key, 0) + weight * value.double()
    last = read_weights(folder)[0]
    return {key: total[key].to(value.dtype) if key in total else value for key, value in last.items()}, architecture


def _told(there: Mapping[Name, str]) -> str:
    if not there:
        return 'it has the one of its "ema" alone: leave the name out, or train it with student.emas'
    return f"it has {', '.join(map(str, there))}"
