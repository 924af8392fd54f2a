"""The weights of finished models, and the choice of a moving average of a student by its name.

A student is sampled with `weights.safetensors`, the average of its config's `ema`. Others are named:

    0.05            the average of this relative width at the end of training, of `student.emas`
    0.05@120000     the same when 120,000 pairs were seen, of `student.snapshots`
    posthoc:0.07    of a width that was not tracked: a combination of all snapshots and of the last averages
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nfm.stages.base import StageError, Unfit
from nfm.storage.files import atomic
from nfm.storage.files.small_files import MOST_STATE_BYTES, read_bytes
from nfm.trainers.training.profiles import WIDEST, Profile, combination

if TYPE_CHECKING:
    import torch

WEIGHTS, SNAPSHOTS = "weights.safetensors", "snapshots"
POSTHOC = "posthoc:"
_RESTORE = "restore it from a copy, or remove the artifact's folder and run its stage again"
SHOWN = 12  # names in a message
LARGEST_ERROR = 0.1  # of the profile of a combination, relative
_NAME = re.compile(rf"({POSTHOC})?(\d*\.?\d+)(?:@(\d+))?")
_FILE = re.compile(r"ema-([\d.]+)(?:@(\d+))?\.safetensors")


def read_weights(folder: Path, file: str = WEIGHTS) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights of a finished stage, in the folder's `file`, and the arguments that build its model again.

    Raises StageError if they are not the ones that the manifest lists: other weights would give other figures.
    """
    from nfm.trainers.checkpoint import CheckpointError, unpack_weights

    try:
        data = read_bytes(folder / file, MOST_STATE_BYTES)
    except FileNotFoundError as error:
        raise StageError(f"{folder / file}: the file is missing; {_RESTORE}") from error
    listed = _listed(folder)
    if listed is not None and hashlib.sha256(data).hexdigest() != listed.get(file):
        raise StageError(f"{folder / file}: its SHA-256 is not the manifest's, the bytes changed; {_RESTORE}")
    try:
        return unpack_weights(data)
    except CheckpointError as error:
        raise StageError(f"{folder / file}: {error}; `nfm audit {folder}` says what else is wrong") from error


def _listed(folder: Path) -> dict[str, str] | None:
    """The SHA-256 of every file in the manifest of a finished stage; None of one that is being made."""
    if not (folder / "manifest.json").exists():
        return None
    files = atomic.read_json(folder / "manifest.json").get("files")
    return None if files is None else {file["path"]: file["sha256"] for file in files}


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
    """The files of all averages of a stage: those of the end, then snapshots in the order of their making.

    Of a finished one they are those of the manifest, whether they are there or not.
    """
    found: dict[Name, str] = {}
    listed = _listed(folder)
    if listed is None:
        paths = (*folder.glob("ema-*"), *(folder / SNAPSHOTS).glob("ema-*"))
        listed = {str(path.relative_to(folder)): "" for path in paths}
    for file in listed:
        if (parts := _FILE.fullmatch(file.removeprefix(f"{SNAPSHOTS}/"))) is not None:
            found[Name(float(parts[1]), int(parts[2]) if parts[2] else None)] = file
    return dict(sorted(found.items(), key=lambda one: (one[0].seen is not None, one[0].seen, one[0].width)))


def parts_of(name: Name, there: Sequence[Name], end: int) -> dict[Name, float]:
    """The averages, of those that are `there`, that an average is the sum of, with their weights.

    `end` is the number of pairs of the training. Raises ValueError for an average that is not there, and where a
    combination would not be the average asked for.
    """
    more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
    told = f"there are {', '.join(map(str, there[:SHOWN]))}{more}" if there else "student.emas names none"
    for same in (name, name._replace(seen=None) if name.seen == end else name):  # the last one is kept by its width
        if same in there:
            return {same: 1.0}
    if not name.posthoc or not there:
        raise ValueError(f"{name}: no such moving average; {told}")
    known = [Profile(end if one.seen is None else one.seen, one.width) for one in there]
    weights, error = combination(known, Profile(end, name.width))
    if error > LARGEST_ERROR:
        raise ValueError(
            f"{name}: the profile that the averages can make is wrong by {error:.0%}; name a width nearer to theirs, "
            f"or train with more student.snapshots; {told}"
        )
    return dict(zip(there, weights, strict=True))


def read(folder: Path, ema: str | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights of a finished student, or of its moving average `ema`, and what builds its network again.

    Combinations are summed in float64. Raises Unfit for an average that it does not have.
    """
    last, architecture = read_weights(folder)
    if ema is None:
        return last, architecture
    files = files_of(folder)
    try:
        end = atomic.read_json(folder / "manifest.json")["metrics"]["pairs_seen"]
        parts = parts_of(parse(ema), list(files), end)
    except ValueError as error:
        raise Unfit(f"{folder}: ema {error}") from error
    total: dict[str, Any] = {}
    for name, weight in parts.items():
        for key, value in read_weights(folder, files[name])[0].items():
            if value.is_floating_point():
                total[key] = total.get(key, 0.0) + weight * value.double()
            else:
                total[key] = last[key]
    return {key: value.to(last[key].dtype) for key, value in total.items()}, architecture
