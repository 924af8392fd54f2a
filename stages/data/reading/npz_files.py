"""The .npz files of a folder that are read: `train_data_batch_*.npz` in numeric order, and `val_data.npz`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nfm.stages.base import Reporter, StageError, Unfit

TRAIN, TEST = "train_data_batch_", "val_data.npz"


def files_of(path: str | None) -> list[Path]:
    """The file at `path`, or the files of the folder at `path`, the test set last."""
    if path is None:
        raise Unfit('data.source = "npz" needs data.path: an .npz file, or a folder of train_data_batch_*.npz')
    root = Path(path)
    if root.is_file():
        return [root]
    batches = sorted(root.glob(f"{TRAIN}*.npz"), key=_numbers)
    if not batches:
        others = sorted(file.name for file in root.glob("*.npz"))[:5]
        instead = f"; it holds {', '.join(others)}: name one of them, or rename them so" if others else ""
        raise Unfit(f"data.path = {path!r} is no .npz file and no folder that holds {TRAIN}*.npz{instead}")
    return batches + [file for file in (root / TEST,) if file.is_file()]


def check_folder(path: str | None, files: Sequence[Path], report: Reporter) -> None:
    """Refuses gaps and repetitions in the numbers of the files. Reports other .npz files, which are not read."""
    folder = Path(path or "")
    if folder.is_file():
        return
    batches = [file for file in files if file.name.startswith(TRAIN)]
    numbers = [_numbers(file)[:1] for file in batches]
    if all(numbers):
        there = [number for (number,) in numbers]
        missing = sorted(set(range(min(1, *there), max(there) + 1)) - set(there))
        if missing:
            raise StageError(
                f"{folder}: {TRAIN}{missing[0]}.npz is missing, the others go to {max(there)}"
                + (f" ({len(missing)} are missing)" if len(missing) > 1 else "")
                + ": fetch it, or number the files without gaps"
            )
        if twice := [number for number in set(there) if there.count(number) > 1]:
            same = ", ".join(file.name for file, number in zip(batches, there) if number == twice[0])
            raise StageError(f"{folder}: {same} have the same number: take away all but one, or renumber them")
    others = sorted({file.name for file in folder.glob("*.npz")} - {file.name for file in files})
    if others:
        report.say(f"{folder}: not read: {', '.join(others[:5])}; only {TRAIN}*.npz and {TEST}, the test set, are")


def _numbers(file: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", file.name)]
