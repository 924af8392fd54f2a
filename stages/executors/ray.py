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
LOST_ACTORS = 5  # so many lost in a row without one shard done: the cluster or the memory is at fault, not chance


class Worker:
    """What runs inside an actor: a teacher loaded once, then shard after shard."""

    def __init__(self, setup: Setup):
        import torch

        torch.set_num_threads(setup.threads)
        self.encoder = Encoder(setup)

    def encode(self, job: ShardJob) -> Commit:
        return self.encoder.encode_shard(job)


def run(
    setup: Setup, jobs: Sequence[ShardJob], workers: int, stopping: Stopping, address: str | None = None
) -> Iterator[Outcome]:
    """Encode the jobs on `workers` actors of the cluster at `address`, RAY_ADDRESS, or a local one made for it."""
    import ray

    workers = min(workers, len(jobs))
    with _cluster(address, workers * setup.threads):
        crew, waiting, lost = _Crew(setup, workers), deque(jobs), 0
        while (waiting or crew.flights) and not stopping():
            crew.send(waiting)
            for seat, job, result in crew.landed():
                if isinstance(result, Commit):
                    lost = 0
                    yield Outcome(job, commit=result)
                elif isinstance(result, ray.exceptions.RayTaskError):
                    if job.tries + 1 < TRIES:
                        waiting.append(job.again(failed=True))
                    else:
                        yield Outcome(job, error=str(result))
                elif getattr(result, "actor_init_failed", False):
                    reason = str(result).strip().splitlines()[-1].partition(": ")[2]
                    raise StageError(f"a Ray actor cannot begin: {reason}") from result
                else:
                    lost += 1
                    if lost > LOST_ACTORS:
                        raise StageError(_gone(lost, result)) from result
                    waiting.extendleft(each.again(failed=False) for each in [*crew.replace(seat), job])
        crew.dismiss()


class _Crew:
    """The actors, each in a numbered seat, and which job is in flight where."""

    def __init__(self, setup: Setup, workers: int):
        import ray

        gpus = 1 if setup.device.startswith("cuda") else 0
        self.hire: Any = ray.remote(num_cpus=setup.threads, num_gpus=gpus, max_restarts=0)(Worker).remote
        self.setup = setup
        self.actors: list[Any] = [self.hire(setup) for _ in range(workers)]
        self.flights: dict[Any, tuple[int, ShardJob]] = {}

    def send(self, waiting: deque[ShardJob]) -> None:
        """Fill every seat up to IN_FLIGHT jobs."""
        for seat, actor in enumerate(self.actors):
            busy = sum(taken == seat for taken, _ in self.flights.values())
            for _ in range(min(IN_FLIGHT - busy, len(waiting))):
                job = waiting.popleft()
                self.flights[actor.encode.remote(job)] = (seat, job)

    def landed(self, seconds: float = 0.5) -> Iterator[tuple[int, ShardJob, Any]]:
        """(seat, job, its commit or the Ray error) of what ended within some time."""
        import ray

        ready, _ = ray.wait(list(self.flights), num_returns=1, timeout=seconds)
        for reference in ready:
            if reference not in self.flights:
                continue  # its seat was given to another actor meanwhile
            seat, job = self.flights.pop(reference)
            try:
                yield seat, job, ray.get(reference)
            except ray.exceptions.RayError as error:
                yield seat, job, error

    def replace(self, seat: int) -> list[ShardJob]:
        """A fresh actor for a dead one's seat; returns the jobs that died with it, the last one first."""
        died = [reference for reference, (taken, _) in self.flights.items() if taken == seat]
        self.actors[seat] = self.hire(self.setup)
        return [self.flights.pop(reference)[1] for reference in reversed(died)]

    def dismiss(self) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)


def _gone(lost: int, error: Exception) -> str:
    return (
        f"{lost} Ray actors in a row died without finishing a shard; the last one: {error}. Look for the reason in "
        "the Ray logs (out of memory is the usual one: lower pairs.batch_size or pairs.workers); committed shards "
        "stay, run the same command again"
    )


@contextmanager
def _cluster(address: str | None, cpus: int) -> Iterator[None]:
    """Connect to a cluster, or make a local one that ends with us; our signal handlers stay ours."""
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
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
