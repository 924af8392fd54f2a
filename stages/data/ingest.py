"""`ingest_shard` decodes one part of a data set, on any machine; `ingested` has all parts decoded by an executor.

What is committed is not decoded again. Images, order and bytes are the same wherever the parts were made. Workers of an
artifact in a bucket bring their parts there; the stage brings all of them here, and removes them in the end.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nfm.stages import executors
from nfm.stages.base import Reporter, Stopped
from nfm.stages.data import parts as of_parts
from nfm.stages.data import records
from nfm.stages.data.config import DataConfig
from nfm.stages.data.parts import Part, PartCommit, Parts
from nfm.stages.data.source import Encoded, Loaded
from nfm.stages.data.sources import opened
from nfm.stages.executors import EXECUTORS, slurm
from nfm.stages.executors.jobs import Job, Outcome, Timing, Unit, Work, jobs_of
from nfm.stages.executors.outcomes import lacking_pieces, settled
from nfm.storage.dataset.shards import shard_writer
from nfm.storage.files.copies import mirror
from nfm.storage.files.parallel import parallel
from nfm.storage.files.paths import as_path, is_remote, several

WRITE_ROWS = 256  # at a time
READ = "images read"  # what progress counts
FILES = 4  # brought at a time, each in several requests


@dataclass(frozen=True, kw_only=True)
class Ingest(Work):
    """Decodes parts of the data set in folder `store`, by its plan and the section [data] of the config.

    `beside` is where the command runs: paths of the config are relative to it.
    """

    unit: ClassVar[str] = "nfm.stages.data.ingest:unit"
    section: ClassVar[str] = "data"
    memory: ClassVar[str] = "data.rows_per_shard, data.threads or data.workers"
    torch: ClassVar[bool] = False
    config: Mapping[str, Any]
    beside: str
    device: str = "cpu"


def unit(work: Ingest) -> Unit:
    """For executors: one part after another."""
    config = DataConfig.model_validate({**work.config, "threads": work.threads})
    if config.path is not None and not is_remote(as_path(config.path)):
        # Not validated: where the command runs may have a name that no config takes.
        config = config.model_copy(update={"path": str(Path(work.beside) / config.path)})
    source, out = opened(config), as_path(work.store)
    plan = of_parts.plan_of(out)

    def ingest(job: Job, stopping: Callable[[], bool]) -> tuple[PartCommit, Timing]:
        with mirror.beside(work.store) as folder:
            return ingest_shard(source, out, job, stopping, plan, folder)

    return ingest


def ingest_shard(
    source: Encoded,
    out: Path,
    job: Job,
    stopping: Callable[[], bool] = lambda: False,
    plan: Path | bytes | None = None,
    folder: Path | None = None,
) -> tuple[PartCommit, Timing]:
    """Decodes one part, writes what can be used of it, and commits it in `out`, by the `plan` there.

    Returns the valid commit, which may be an earlier one. Raises InterruptedError if `stopping()` becomes true between
    batches of images; then nothing is published. If `out` is in a bucket, files are written to `folder` first.
    """
    began, mine = time.monotonic(), of_parts.read_slice(plan or of_parts.plan_of(out), job.name)
    here, name = folder or out, of_parts.part_file(job.name, job.attempt)
    file, scratch = here / name, here / of_parts.FOLDER / f"scratch.{job.attempt}"
    scratch.mkdir(parents=True)
    try:
        loaded = source.decode(mine.places, mine.about, mine.size, scratch, stopping)
        decoded = time.monotonic()
        usable = np.setdiff1d(np.arange(len(mine.labels)), list(loaded.rejected))
        sha256, size = "", 0
        if len(usable):
            split, number = of_parts.split_name(job.name)
            with shard_writer(file, split, number, len(usable), loaded.images.shape[1:], "uint8") as shard:
                for start in range(0, len(usable), WRITE_ROWS):
                    some = usable[start : start + WRITE_ROWS]
                    shard.append({"image": loaded.images[some], "label": mine.labels[some]})
                (stored,) = shard.close()
            sha256, size = stored.sha256, stored.bytes
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if size and is_remote(out):
        mirror.push(out, here, {name: (sha256, size)}, lambda: None)  # no other attempt writes to that name
    ended = time.monotonic()
    commit = records.publish(
        out,
        PartCommit(
            name=job.name,
            attempt=job.attempt,
            rows_digest=mine.digest,
            records=len(usable),
            bytes=size,
            sha256=sha256,
            rejected={str(place): reason for place, reason in loaded.rejected.items()},
            notes=loaded.notes,
            seconds=ended - began,
        ),
    )
    return commit, Timing(ended - began, read=decoded - began, write=ended - decoded)


def ingested(
    source: Encoded, rows: np.ndarray, labels: np.ndarray, own: int, config: DataConfig, out: Path, report: Reporter
) -> Loaded:
    """All rows, decoded: those of parts without a commit now, on the executor of the config."""
    shared = out if config.executor == "serial" else as_path(mirror.origin(out))  # what all workers see
    plan, size = planned(source, rows, labels, own, config, shared, report)
    found = _commits(shared, plan)
    lacking = [part for part, commit in zip(plan, found) if commit is None]
    done = len(rows) - sum(len(part.positions) for part in lacking)
    if len(lacking) < len(plan):
        report.say(f"{len(plan) - len(lacking)} of {len(plan)} parts are decoded already")
    failed = []
    executor = EXECUTORS[config.executor]
    if lacking and not executor.later:
        work = _work(shared, config.model_dump(mode="json"), threads_of(config))
        outcomes = executors.run(config, work, jobs_of(part.name for part in lacking), report)
        reads = {part.name: len(part.positions) for part in lacking}
        failed = settled(shared, outcomes, report, done, len(rows), READ, lambda commit: reads[commit.name])
        found = _commits(shared, plan)
    commits = [commit for commit in found if commit is not None]
    if missing := [part for part, commit in zip(plan, found) if commit is None]:
        if report.stopping or (report.ending and len(missing) > len(failed)):
            raise Stopped
        names = [part.name for part in missing]
        raise lacking_pieces(shared, names, len(plan), "parts of the data", executor.again("data"))
    if is_remote(shared):
        _bring(shared, out, commits, report)
    notes: Counter[str] = Counter()
    for commit in commits:
        notes.update(commit.notes)
    source.tell_taken(notes, report)
    images = Parts(out, plan, commits, image_shape(config, size))
    return Loaded(images, images.rejected, source.skipped.reasons, dict(sorted(notes.items())))


def planned(
    source: Encoded, rows: np.ndarray, labels: np.ndarray, own: int, config: DataConfig, shared: Path, report: Reporter
) -> tuple[list[Part], tuple[int, int]]:
    """The parts of the data set, and the (height, width) of its images; what workers need of them is written."""
    size = source.look(report)
    plan = of_parts.planned(source, rows, labels, own, config.rows_per_shard, size)
    of_parts.write_plan(shared, plan, source, rows, labels, size)
    return plan, size


def lacking(shared: Path, plan: Sequence[Part]) -> list[str]:
    """The names of the parts without a valid commit."""
    return [part.name for part, commit in zip(plan, _commits(shared, plan)) if commit is None]


def decode(
    config: Mapping[str, Any], out: Path, mine: Sequence[str], left: Sequence[str], report: Reporter
) -> list[Outcome]:
    """Decodes the parts `left` of those that are a task's. Returns the failures."""
    plan = of_parts.plan_of(out)
    reads = {name: len(of_parts.read_slice(plan, name).labels) for name in mine}
    done = sum(reads[name] for name in mine) - sum(reads[name] for name in left)
    outcomes = slurm.run(_work(out, config, max(1, config["threads"])), jobs_of(left), 1, report)
    return settled(out, outcomes, report, done, sum(reads.values()), READ, lambda commit: reads[commit.name])


def threads_of(config: DataConfig) -> int:
    """The threads of a worker, 0 for as many as there are cores."""
    return config.threads if config.executor == "serial" else max(1, config.threads)


def _commits(out: Path, plan: Sequence[Part]) -> list[PartCommit | None]:
    """The valid commit of each part, None where there is none."""
    return list(several(out, lambda part: of_parts.committed(out, part), plan))


def _bring(shared: Path, out: Path, commits: Sequence[PartCommit], report: Reporter) -> None:
    """Brings the files of all parts here."""
    report.say(f"{len(commits)} parts are decoded; their files are brought here from {shared}")
    files = [{"path": made.file, "sha256": made.sha256, "bytes": made.bytes} for made in commits if made.records]
    for _ in parallel(lambda file: mirror.fetch(shared, out, file), files, FILES):
        if report.stopping:
            raise Stopped


def _work(out: Path, config: Mapping[str, Any], threads: int) -> Ingest:
    return Ingest(
        store=str(out if is_remote(out) else out.absolute()), config=config, beside=str(Path.cwd()), threads=threads
    )


def image_shape(config: DataConfig, size: tuple[int, int]) -> tuple[int, int, int]:
    """[C, H, W] as stored, of encoded images of such a (height, width)."""
    height, width = size
    return config.channels, height // config.average, width // config.average
