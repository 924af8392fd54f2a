"""The slurm executor: task i of n does the jobs of a fixed list whose number mod n is i, in series, without Ray.

The list never changes. So tasks that start at different times agree on their work without communication. A task that
starts again skips committed jobs. If two tasks do the same job, it still gets only one commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nfm.stages.executors import serial
from nfm.stages.executors.jobs import Halt, Job, Outcome, Work
from nfm.storage.files.paths import as_path, exists
from nfm.storage.ledger import commits


def share(names: Sequence[str], task: int, of: int) -> list[str]:
    """The names for task `task` of `of`. Each name belongs to exactly one task."""
    return list(names[task::of])


def open_names(store: str | Path, names: Iterable[str]) -> list[str]:
    """The names that have no commit yet."""
    root = as_path(store)
    return [name for name in names if not exists(commits.commit_path(root, name))]


def run(work: Work, jobs: Iterable[Job], workers: int, halt: Halt) -> Iterator[Outcome | None]:
    """Does the jobs of one task in this process, in order. Skips those that others have committed meanwhile."""
    return serial.run(work, _still_open(work.store, jobs, halt), workers, halt)


def _still_open(store: str, jobs: Iterable[Job], halt: Halt) -> Iterator[Job]:
    for job in jobs:
        if halt.ending:
            return
        if open_names(store, [job.name]):
            yield job
