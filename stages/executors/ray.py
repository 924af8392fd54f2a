"""The Ray executor: one actor a GPU or CPU share; descriptors go in, commits come out, images never do.

The driver owns the attempts. An actor that dies (a killed process, a lost node, Ray's memory monitor) is replaced and
its shards start again; a shard that fails by itself is tried `TRIES` times, one that kills its worker `DEATHS` times.
A cluster that this process did not start is left running, and so is everything on it that is not ours.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nfm.stages.base import StageError
from nfm.stages.encoding.encoder import Setup
from nfm.stages.encoding.jobs import TRIES, Halt, Outcome, ShardJob
from nfm.stages.executors.ray_actors import IN_FLIGHT, ActorPool, Answer
from nfm.stages.executors.ray_cluster import cluster

DEATHS = 5
LOSSES = 10  # with whole nodes as well, which one shard may run out of memory
PATIENCE_SECONDS = 600.0


def run(
    setup: Setup,
    jobs: Iterable[ShardJob],
    workers: int,
    halt: Halt,
    address: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    patience: float = PATIENCE_SECONDS,
) -> Iterator[Outcome | None]:
    """Encode the jobs, drawn as they are needed, on `workers` actors of a cluster; 0 means as many as it carries.

    The cluster is the one that this process is connected to, else the one at `address` or RAY_ADDRESS, else a local
    one that is made for it. `say` hears what a person should know. Raises StageError when no cluster answers, when no
    actor is ready for `patience` seconds, when one cannot begin, and when one after another dies.
    """
    backlog = _Backlog(jobs)
    if halt.ending or not backlog.refill(1):
        return
    with cluster(address, workers, setup.threads, setup.device) as share:
        pool = ActorPool(setup, workers, share, say, patience)
        try:
            yield from _Production(pool, backlog, halt, say).outcomes()
        finally:
            pool.close()


def on_a_worker(
    work: Callable[..., Any], device: str, threads: int, address: str | None, *arguments: Any, **options: Any
) -> Any:
    """`work(*arguments, device=..., **options)` on one worker's share of a cluster, where its devices are.

    Raises StageError when no worker had room within ten minutes, and what `work` raises.
    """
    import ray

    with cluster(address, 1, threads, device) as share:
        remote: Any = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=3)(work)
        answer = remote.remote(*arguments, device="cuda" if share.gpus else device.replace("auto", "cpu"), **options)
        try:
            return ray.get(answer, timeout=PATIENCE_SECONDS)
        except ray.exceptions.GetTimeoutError as error:
            raise StageError(
                f"no Ray worker answered within {PATIENCE_SECONDS:.0f} s: {share} was asked for, the cluster has "
                f"{share.left()}; add nodes, or set pairs.batch_size to a number"
            ) from error


class _Backlog:
    """Jobs that wait: few are drawn from their source before they are needed.

    `suspects` were in hand when their actor died. They wait until another shard is done or none is left: so it shows
    whether one shard kills actors, or whatever they work on.
    """

    def __init__(self, jobs: Iterable[ShardJob]):
        self._source = iter(jobs)
        self.waiting: deque[ShardJob] = deque()
        self.suspects: list[ShardJob] = []

    def refill(self, count: int) -> bool:
        """Draw until this many wait; false when none does."""
        while len(self.waiting) < count and (job := next(self._source, None)) is not None:
            self.waiting.append(job)
        if not self.waiting:
            self.release()
        return bool(self.waiting)

    def release(self) -> None:
        """Let the suspects try again."""
        self.waiting.extend(self.suspects)
        self.suspects.clear()

    def close(self) -> None:
        self._source = iter(())
        self.waiting.clear()
        self.suspects.clear()


class _Production:
    """From jobs to outcomes, through whatever happens to the actors."""

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
        """What a call's answer means: an outcome, or another attempt later."""
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

    def _died(self, job: ShardJob, answer: Answer) -> Outcome | None:
        """The actor died with this shard in hand: it starts again later, or is set aside as the reason."""
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
        """Give up the seat of a dead actor; what was queued there starts again first."""
        seat = answer.seat
        self.backlog.waiting.extendleft(job.again() for job in reversed(self.pool.remove(seat)))
        self.say(f"lost Ray actor {seat.name}: {_reason(answer.result)}; its shards start again elsewhere")
        self.lost.add(what if isinstance(answer.call, ShardJob) else f"{what}, {len(self.lost)}")
        if len(self.lost) > max(5, 3 * self.pool.wanted):
            raise StageError(
                f"{len(self.lost)} Ray actors in a row died without finishing a shard; the last one: "
                f"{_reason(answer.result)}. Look for the reason in the Ray logs (out of memory is the usual one: "
                "lower pairs.batch_size or pairs.workers); committed shards stay, run the same command again"
            ) from answer.result

    def _not_begun(self, answer: Answer) -> None:
        """An actor that cannot load its teacher ends the run, unless others can: then its node is at fault."""
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
    return lines[-1].partition(" Some common causes")[0].strip()


def _plain(error: Exception) -> str:
    """Ray's text without the colours of a terminal."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error))


def _with_its_node(error: Any) -> bool:
    """Whether the whole node left, which no shard is to blame for."""
    return bool(getattr(error, "preempted", False)) or "node has died" in str(error)
