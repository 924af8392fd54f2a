"""The serial executor: encodes all shards in this process, one after another. For debugging, and for array tasks."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Iterable, Iterator

from nfm.stages.encoding.encoder import Encoder, Setup
from nfm.stages.encoding.jobs import TRIES, Halt, Outcome, ShardJob
from nfm.stages.encoding.overlap import Ahead, running
from nfm.stages.encoding.threads import threads

TICK_SECONDS = 1.0


def run(setup: Setup, jobs: Iterable[ShardJob], workers: int, halt: Halt) -> Iterator[Outcome | None]:
    """Encodes the jobs in order, always with one worker."""
    with threads(setup.threads):
        outcomes = Ahead(_outcomes(setup, jobs, halt), depth=1)
        with running(outcomes):
            while True:
                if not outcomes.wait(TICK_SECONDS):
                    yield None
                    continue
                try:
                    yield outcomes.take()
                except StopIteration:
                    return


def _outcomes(setup: Setup, jobs: Iterable[ShardJob], halt: Halt) -> Iterator[Outcome]:
    worker = f"{socket.gethostname()}:{os.getpid()}"
    encoder = Encoder(setup)
    for job in jobs:
        while not halt.ending:
            try:
                commit = encoder.encode_shard(job, lambda: halt.stopping)
                yield Outcome(job, commit=commit, worker=worker, timing=encoder.timing)
                break
            except InterruptedError:
                return
            except Exception:
                job = job.again(failed=True)
                if job.tries >= TRIES:
                    yield Outcome(job, error=traceback.format_exc(), worker=worker)
                    break
