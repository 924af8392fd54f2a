"""The Ray executor: one actor a GPU or CPU share; descriptors go in, commits come out, images never do.

The driver keeps at most two shards in flight an actor. An actor that dies (a killed process, a lost node) is
replaced and its shards start again under new attempts; a shard that fails by itself is tried three times.
A cluster that this process did not start is left running.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nfm.stages.encoder import Encoder, Setup
from nfm.stages.executors import TRIES, Outcome, ShardJob, Stopping
from nfm.stages.stage import StageError
from nfm.storage.commits import Commit

IN_FLIGHT = 2
LOST_ACTORS = 10  # this many actors lost in a row without one shard done: the cluster, or the memory, is at fault


class Worker:
    """What runs inside an actor: a teacher loaded once, then shard after shard."""

    def __init__(self, setup: Setup):
        self.encoder = Encoder(setup)

    def encode(self, job: ShardJob) -> Commit:
        return self.encoder.encode_shard(job)


def run(
    setup: Setup, jobs: Sequence[ShardJob], workers: int, stopping: Stopping, address: str | None = None
) -> Iterator[Outcome]:
    """Encode the jobs on `workers` actors of the cluster at `address`, RAY_ADDRESS, or a local one made for it."""
    import ray

    gpus = 1 if setup.device.startswith("cuda") else 0
    workers = min(workers, len(jobs))
    with _cluster(address, workers * setup.threads):
        actor_type: Any = ray.remote(num_cpus=setup.threads, num_gpus=gpus, max_restarts=0)(Worker)
        waiting = deque(jobs)
        crew = [actor_type.remote(setup) for _ in range(workers)]
        flights: dict[Any, tuple[int, ShardJob]] = {}
        lost = 0
        while (waiting or flights) and not stopping():
            for seat in range(workers):
                while waiting and sum(at == seat for at, _ in flights.values()) < IN_FLIGHT:
                    job = waiting.popleft()
                    flights[crew[seat].encode.remote(job)] = (seat, job)
            ready, _ = ray.wait(list(flights), num_returns=1, timeout=0.5)
            for reference in ready:
                if reference not in flights:
                    continue  # its actor was replaced in this round
                seat, job = flights.pop(reference)
                try:
                    commit = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    job = job.again(failed=True)
                    if job.tries >= TRIES:
                        yield Outcome(job, error=str(error))
                    else:
                        waiting.append(job)
                except ray.exceptions.RayError as error:
                    lost += 1
                    if lost > LOST_ACTORS:
                        raise StageError(
                            f"{lost} Ray actors in a row died without finishing a shard; the last one: {error}. "
                            "Look for the reason in the Ray logs (out of memory is the usual one: lower "
                            "pairs.batch_size or pairs.workers); committed shards stay, run the same command again"
                        ) from error
                    dead = [job, *(flights.pop(r)[1] for r, f in list(flights.items()) if f[0] == seat)]
                    waiting.extendleft(job.again(failed=False) for job in reversed(dead))
                    crew[seat] = actor_type.remote(setup)
                else:
                    lost = 0
                    yield Outcome(job, commit=commit)
        for actor in crew:
            ray.kill(actor)


@contextmanager
def _cluster(address: str | None, cpus: int) -> Iterator[None]:
    """Connect to a cluster, or make a local one that ends with us; our signal handlers stay ours."""
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "namespace": "nfm"}
    connected = ray.is_initialized()
    if not connected:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(
                address="local", num_cpus=max(cpus, 1), include_dashboard=False,
                object_store_memory=80 * 2**20, **quiet,
            )  # fmt: skip
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    try:
        yield
    finally:
        if not connected:
            ray.shutdown()
