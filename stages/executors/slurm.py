"""The slurm executor: task i of n encodes the shards of a fixed list whose number mod n is i, in series, without Ray.

The list never changes. So tasks that start at different times agree on their work without communication. A task that
starts again skips committed shards. If two tasks encode the same shard, it still gets only one commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nfm.stages.encoding.encoder import Setup
from nfm.stages.encoding.jobs import Halt, Outcome, ShardJob
from nfm.stages.executors import serial
from nfm.storage.files.paths import as_path, exists
from nfm.storage.ledger import commits


def share(names: Sequence[str], task: int, of: int) -> list[str]:
    """The names for task `task` of `of`. Each name belongs to exactly one task."""
    return list(names[task::of])


def open_names(store: str | Path, names: Iterable[str]) -> list[str]:
    """The names that have no commit yet."""
    root = as_path(store)
    return [name for name in names if not exists(commits.commit_path(root, name))]


def run(setup: Setup, jobs: Iterable[ShardJob], workers: int, halt: Halt) -> Iterator[Outcome | None]:
    """Encodes the jobs of one task in this process, in order. Skips those that others have committed meanwhile."""
    return serial.run(setup, _still_open(setup.store, jobs, halt), workers, halt)


def _still_open(store: str, jobs: Iterable[ShardJob], halt: Halt) -> Iterator[ShardJob]:
    for job in jobs:
        if halt.ending:
            return
        if open_names(store, [job.name]):
            yield job
