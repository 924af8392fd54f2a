"""The serial executor: every shard in this process, one after another; for debugging and small stores."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence

from nfm.stages.encoder import Encoder, Setup, threads
from nfm.stages.executors import TRIES, Outcome, ShardJob, Stopping


def run(setup: Setup, jobs: Sequence[ShardJob], workers: int, stopping: Stopping) -> Iterator[Outcome]:
    """Encode the jobs in order; `workers` is one whatever it says."""
    with threads(setup.threads):
        encoder = Encoder(setup)
        for job in jobs:
            while not stopping():
                try:
                    yield Outcome(job, commit=encoder.encode_shard(job, stopping))
                    break
                except InterruptedError:
                    return
                except Exception:
                    job = job.again(failed=True)
                    if job.tries >= TRIES:
                        yield Outcome(job, error=traceback.format_exc())
                        break
