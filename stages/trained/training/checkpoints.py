"""The checkpoints of a training in its folder, and in a bucket, from which another machine goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

from nfm.stages.display.watching.grids import grids_of
from nfm.stages.display.watching.lines import METRICS
from nfm.stages.trained.weights import files_of
from nfm.storage.files.copies.resume import Resume, newest
from nfm.storage.files.paths import is_remote, names_in, temporary_name

CHECKPOINTS = "checkpoints"
OLD_CHECKPOINT = "checkpoint.safetensors"  # where earlier versions kept the state of a training


def seen_of(old_checkpoint: bytes) -> int:
    """How far the training came whose checkpoint this is, in one file."""
    from nfm.trainers.checkpoint import unpack

    return int(unpack(old_checkpoint)[1]["examples_seen"])


def newest_checkpoint(out: Path) -> int:
    """The examples seen of the newest checkpoint, 0 where there is none."""
    if is_remote(out):
        return newest(out)
    return max((int(name) for name in names_in(out / CHECKPOINTS) if name.isdecimal()), default=0)


def put(out: Path, resume: Resume, checkpoint: Path) -> None:
    """Brings a checkpoint to the bucket, with the log and the snapshots so far."""
    if not resume.elsewhere:
        return
    seen, log = int(checkpoint.name), out / temporary_name(METRICS)
    shutil.copyfile(out / METRICS, log)  # lines are added to the log meanwhile
    try:
        snapshots = [file for name, file in files_of(out).items() if name.seen is not None and name.seen <= seen]
        resume.put(seen, {**{path.name: path for path in checkpoint.iterdir()}, METRICS: log}, snapshots)
    finally:
        log.unlink()


def bring(out: Path, resume: Resume) -> None:
    """Brings the newest checkpoint of another machine here, with its log, if it is newer than those that are here."""
    if (seen := resume.newest()) > newest_checkpoint(out):
        folder = out / CHECKPOINTS / f"{seen:012d}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        resume.bring(folder)
        (folder / METRICS).replace(out / METRICS)


def kept_files(out: Path) -> list[str]:
    """What a finished training leaves beside its weights."""
    states = [path for path in sorted((out / CHECKPOINTS).rglob("*")) if path.is_file()]
    return [*(str(path.relative_to(out)) for path in (*states, *grids_of(out).values())), METRICS]
