"""The Ray executor: one actor for each GPU or share of CPUs. It sends jobs and gets commits, no images.

The driver manages the attempts. If an actor dies (a killed process, a lost node, Ray's memory monitor), it is replaced
and its shards start again. A shard that fails is tried `TRIES` times; one whose worker dies, `DEATHS` times. A cluster
that this process did not start keeps running, with everything on it that is not ours.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from nfm.stages.base import StageError
from nfm.stages.couplings.custom import called_beside
from nfm.stages.executors.jobs import TRIES, Halt, Job, Outcome, Work
from nfm.stages.executors.ray_actors import IN_FLIGHT, ActorPool, Answer
from nfm.stages.executors.ray_cluster import cluster
from nfm.stages.executors.ray_messages import logs

DEATHS = 5
LOSSES = 10  # including lost nodes, which a single shard may run out of memory
PATIENCE_SECONDS = 600.0


def run(
    work: Work,
    jobs: Iterable[Job],
    workers: int,
    halt: Halt,
    address: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    patience: float = PATIENCE_SECONDS,
) -> Iterator[Outcome | None]:
    """Does the jobs on `workers` actors of a cluster; 0 means as many as fit. Jobs are taken as they are needed.

    The cluster is the one that this process is connected to, else the one at `address` or RAY_ADDRESS, else a new local
    one. `say` gets messages for the user. Raises StageError if no cluster answers, if no actor is ready for `patience`
    seconds, if an actor cannot start, or if one actor after another dies.
    """
    backlog = _Backlog(jobs)
    if halt.ending or not backlog.refill(1):
        return
    with cluster(address, workers, work.threads, work.device, work.section) as share:
        pool = ActorPool(work, workers, share, say, patience)
        try:
            yield from _Production(pool, backlog, halt, say).outcomes()
        finally:
            pool.close()


def on_a_worker(
    work: Callable[..., Any], device: str, threads: int, address: str | None, /, *arguments: Any, **options: Any
) -> Any:
    """Runs `work(*arguments, device=..., **options)` on the share of one worker in a cluster, where its devices are.

    It finds the modules of this folder, as every worker does.
    Raises StageError if no worker had room within ten minutes, and what `work` raises.
    """
    import ray

    with cluster(address, 1, threads, device) as share:
        remote: Any = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=3)(called_beside)
        where = "cuda" if share.gpus else device.replace("auto", "cpu")
        answer = remote.remote(Path.cwd(), work, *arguments, device=where, **options)
        try:
            return ray.get(answer, timeout=PATIENCE_SECONDS)
        except ray.exceptions.GetTimeoutError as error:
            raise StageError(
                f"no Ray worker answered within {PATIENCE_SECONDS:.0f} s: {share} was asked for, the cluster has "
                f"{share.left()}; add nodes, or set pairs.batch_size to a number"
            ) from error
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error


class _Backlog:
    """Waiting jobs. They are taken from their source only shortly before they are needed.

    `suspects` are jobs whose actor died. They wait until another shard is done, or none is left. This shows whether a
    single shard kills actors, or every shard does.
    """

    def __init__(self, jobs: Iterable[Job]):
        self._source = iter(jobs)
        self.waiting: deque[Job] = deque()
        self.suspects: list[Job] = []

    def refill(self, count: int) -> bool:
        """Takes jobs until this many wait. Returns False if none waits."""
        while len(self.waiting) < count and (job := next(self._source, None)) is not None:
            self.waiting.append(job)
        if not self.waiting:
            self.release()
        return bool(self.waiting)

    def release(self) -> None:
        """Lets the suspects try again."""
        self.waiting.extend(self.suspects)
        self.suspects.clear()

    def close(self) -> None:
        self._source = iter(())
        self.waiting.clear()
        self.suspects.clear()


class _Production:
    """Turns jobs into outcomes, whatever happens to the actors."""

    def __init__(self, pool: ActorPool, backlog: _Backlog, halt: Halt, say: Callable[[str], None]):
        self.pool, self.backlog, self.halt, self.say = pool, backlog, halt, say
        self.losses: Counter[str] = Counter()
        self.lost: set[str] = set()  # shards and starts that ended with their actor since the last commit

    def outcomes(self) -> Iterator[Outcome | None]:
        pool, backlog = self.pool, self.backlog
        while not self.halt.stopping:
            if self.halt.ending:
                backlog.close()
                pool.end()
            backlog.refill((IN_FLIGHT + 1) * pool.wanted)
            if not backlog.waiting and not pool.in_flight:
                return
            pool.fill(len(backlog.waiting) + pool.in_flight)
            pool.send(backlog.waiting)
            answer = pool.next_answer()
            outcome = self._settle(answer) if answer else None
            if outcome or not answer:
                yield outcome

    def _settle(self, answer: Answer) -> Outcome | None:
        """Interprets the answer to a call: an outcome, or another attempt later."""
        import ray

        job, result, worker = answer.call, answer.result, answer.seat.name
        died = isinstance(result, ray.exceptions.RayError) and not isinstance(result, ray.exceptions.RayTaskError)
        if isinstance(job, str):
            if not isinstance(result, ray.exceptions.RayError):
                self.pool.welcome(answer)
            elif isinstance(result, ray.exceptions.RayActorError) and not result.actor_init_failed:
                self._lose(answer, f"{worker} at its start")
            else:
                self._not_begun(answer)
            return None
        if died:
            return self._died(job, answer)
        if isinstance(result, ray.exceptions.RayTaskError):
            job = job.again(failed=True)
            if job.tries >= TRIES:
                return Outcome(job, error=_plain(result), worker=worker)
            self.backlog.waiting.append(job)
            return None
        if result is None:
            return None
        commit, timing = result
        self.lost.clear()
        self.backlog.release()
        return Outcome(job, commit=commit, worker=worker, timing=timing)

    def _died(self, job: Job, answer: Answer) -> Outcome | None:
        """Handles a shard whose actor died: it starts again later, or is set aside as the cause."""
        self._lose(answer, job.name)
        job = job.again(died=not _with_its_node(answer.result))
        self.losses[job.name] += 1
        if job.deaths >= DEATHS or self.losses[job.name] >= LOSSES:
            self.lost.discard(job.name)
            what = "killed its worker five times" if job.deaths >= DEATHS else f"was lost with its node {LOSSES} times"
            return Outcome(job, error=f"{what}; the last: {_plain(answer.result)}", worker=answer.seat.name)
        self.backlog.suspects.append(job)
        return None

    def _lose(self, answer: Answer, what: str) -> None:
        """Removes a dead actor. Jobs that were queued there start again first."""
        seat = answer.seat
        self.backlog.waiting.extendleft(job.again() for job in reversed(self.pool.remove(seat)))
        self.say(
            f"lost Ray actor {seat.name}: {_reason(answer.result)}; its shards start again elsewhere (its logs are in "
            f"{logs()})"
        )
        self.lost.add(what if isinstance(answer.call, Job) else f"{what}, {len(self.lost)}")
        if len(self.lost) > max(5, 3 * self.pool.wanted):
            raise StageError(
                f"{len(self.lost)} Ray actors in a row died without finishing a shard; the last one: "
                f"{_reason(answer.result)}. Look for the reason in {logs()} (out of memory is the usual one: "
                f"lower {self.pool.work.memory}); committed shards stay, run the same command again"
            ) from answer.result

    def _not_begun(self, answer: Answer) -> None:
        """Handles an actor that could not begin: the run ends, unless other actors could.

        Then the node is at fault.
        """
        seat = answer.seat
        self.pool.remove(seat)
        where = f" on {seat.host}" if seat.host else ""
        text = f"a Ray actor cannot begin{where}: {_reason(answer.result)}"
        if not self.pool.working:
            raise StageError(text) from answer.result
        self.pool.pause()
        self.say(f"{text}; the others go on, another is tried in a minute")


def _reason(error: Any) -> str:
    """One line that says why a call failed."""
    import ray

    cause = getattr(error, "cause", None)
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(cause, Exception):
        first = str(cause).strip().partition("\n")[0]
        return first if isinstance(cause, StageError) else f"{type(cause).__name__}: {first}"
    lines = _plain(error).strip().splitlines() or ["no message"]
    said = lines[-1].partition(" Some common causes")[0].rpartition("Worker exit detail: ")[2]
    return said.strip().rstrip(".")


def _plain(error: Exception) -> str:
    """Ray's message without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error))


def _with_its_node(error: Any) -> bool:
    """Whether the whole node was lost, which is not the fault of a shard."""
    return bool(getattr(error, "preempted", False)) or "node has died" in str(error)
