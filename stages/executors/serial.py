"""The serial executor: does all jobs in this process, one after another. For one machine, and for array tasks."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Iterable, Iterator
from contextlib import nullcontext

from nfm.stages.executors.jobs import TRIES, Halt, Job, Outcome, Work
from nfm.stages.executors.overlap import Ahead, running
from nfm.stages.trained.devices.machine import threads

TICK_SECONDS = 1.0


def run(work: Work, jobs: Iterable[Job], workers: int, halt: Halt) -> Iterator[Outcome | None]:
    """Does the jobs in order, always with one worker."""
    with threads(work.threads) if work.torch else nullcontext():
        outcomes = Ahead(_outcomes(work, jobs, halt), depth=1)
        with running(outcomes):
            while True:
                if not outcomes.wait(TICK_SECONDS):
                    yield None
                    continue
                try:
                    yield outcomes.take()
                except StopIteration:
                    return


def _outcomes(work: Work, jobs: Iterable[Job], halt: Halt) -> Iterator[Outcome]:
    worker = f"{socket.gethostname()}:{os.getpid()}"
    unit = work.begin()
    for job in jobs:
        while not halt.ending:
            try:
                commit, timing = unit(job, lambda: halt.stopping)
                yield Outcome(job, commit=commit, worker=worker, timing=timing)
                break
            except InterruptedError:
                return
            except Exception:
                job = job.again(failed=True)
                if job.tries >= TRIES:
                    yield Outcome(job, error=traceback.format_exc(), worker=worker)
                    break
