"""Shards for tests of the Ray executor, and a helper that kills the actors which encode them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nfm.stages.encoding.encoder import Setup
from nfm.stages.executors import serial
from nfm.stages.executors.jobs import Job, Outcome, new_attempt
from nfm.stages.pairs import stage as pairs
from nfm.storage.format.spec import shard_name
from nfm.storage.ledger import commits

if TYPE_CHECKING:
    from tests.conftest import Lab

NAMES = [f"d{draw:03}-s{shard:05}" for draw in range(2) for shard in range(4)]


class Switch:
    """A halt that a test turns."""

    stopping = ending = False


def bare(lab: Lab, store: Path) -> Setup:
    """The setup of a copy of the tiny run's store at `store`, all shards missing; a model call each image."""
    shutil.copytree(lab.only("pairs").path, store, ignore=shutil.ignore_patterns("shards", "commits", "index"))
    inputs = {stage: lab.only(stage).path for stage in ("data", "teacher")}
    return replace(pairs.setup(pairs.PairsConfig(), inputs, store), batch_size=1, threads=1)


def serially(lab: Lab, store: Path) -> dict[str, str]:
    """SHA-256 of every shard as the serial executor writes it."""
    setup = bare(lab, store)
    assert committed(ended(serial.run(setup, jobs(), 1, Switch()))) == NAMES
    return digests(setup)


def jobs() -> list[Job]:
    return [Job(shard_name(draw, shard), new_attempt()) for draw in range(2) for shard in range(4)]


def digests(setup: Setup) -> dict[str, str]:
    return {name: commit.payload.sha256 for name, commit in commits.committed(setup.store, 2).items()}


def committed(outcomes: list[Outcome]) -> list[str]:
    return sorted(outcome.commit.name for outcome in outcomes if outcome.commit)


def ended(outcomes: Iterator[Outcome | None]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome]


def writer_of(store: str, name: str) -> int | None:
    """The process that has a file of this shard open: the actor in the middle of it."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if not (folder / "cmdline").read_bytes().startswith(b"ray::Worker"):
                continue
            for link in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(link)
                    if target.startswith(store) and name in target:
                        return int(folder.name)
    return None


class Assassin(threading.Thread):
    """Kills whichever process writes a shard, the first `times` times; `kills` counts them."""

    def __init__(self, setup: Setup, name: str, times: int):
        super().__init__(daemon=True)
        self.store, self.victim, self.times, self.kills, self.over = setup.store, name, times, 0, False

    def run(self) -> None:
        while self.kills < self.times and not self.over:
            if (pid := writer_of(self.store, self.victim)) is not None:
                os.kill(pid, signal.SIGKILL)
                self.kills += 1
                while writer_of(self.store, self.victim) == pid:
                    time.sleep(0.001)
            time.sleep(0.002)

    def __enter__(self) -> Assassin:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over = True
        self.join()
