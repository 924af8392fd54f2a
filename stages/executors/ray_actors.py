"""The pool of Ray actors: their resources, their calls in progress, and which are started, lost or replaced.

An actor goes through three states: *asked for* (its resources are not granted yet), *placed* (its process runs and
begins its work), *ready* (it takes jobs, at most `IN_FLIGHT` at once).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from nfm.stages.base import StageError
from nfm.stages.executors.jobs import Job, Timing, Work
from nfm.stages.executors.ray_cluster import Share, carried

IN_FLIGHT = 2
ANSWER_SECONDS = 1.0  # how long an answer is waited for at a time
LOOK_SECONDS = 1.0  # how often to check for nodes that came or left
# seconds until the first message that actors wait for resources, and between messages
FIRST_WORD, NEXT_WORD = 10.0, 30.0
PAUSE_SECONDS = 60.0  # how long to start no actor after one could not start while others work


class Worker:
    """The code inside an actor: it begins once, then does one job after another."""

    def __init__(self) -> None:
        self.ending = False

    def place(self) -> str:
        """The address of the node. It answers when the resources are granted."""
        import ray

        return ray.util.get_node_ip_address()

    def begin(self, work: Work) -> None:
        if work.torch:
            import torch

            torch.set_num_threads(work.threads)
        self.unit = work.begin()

    def do(self, job: Job) -> tuple[Any, Timing] | None:
        """The valid commit and where the time went; None for a job that had not started when the end came."""
        return None if self.ending else self.unit(job, lambda: False)

    def end(self) -> None:
        """Makes it start no other job. Runs in parallel with `do`."""
        self.ending = True


@dataclass
class Seat:
    """One actor and its calls without an answer, in order. A call is a job, or the name of a method."""

    number: int
    actor: Any
    calls: deque[tuple[Any, Job | str]] = field(default_factory=deque)
    host: str = ""
    ready: bool = False

    @property
    def name(self) -> str:
        """A short name, which the actor's successor gets too."""
        return f"{self.host or 'unplaced'}/{self.number}"

    @property
    def jobs(self) -> list[Job]:
        return [call for _, call in self.calls if isinstance(call, Job)]


@dataclass(frozen=True)
class Answer:
    """A call with its answer: a value, or an error of Ray."""

    seat: Seat
    call: Job | str
    result: Any


class ActorPool:
    """The actors for some work: `workers` of them, or if that is 0, as many as fit on the cluster at the time.

    `wanted` is this number when it was last computed. `say` gets messages about actors that wait for resources. Raises
    StageError if none is ready for `patience` seconds.
    """

    def __init__(self, work: Work, workers: int, share: Share, say: Callable[[str], None], patience: float):
        import ray

        self.work = replace(work, device="cuda" if share.gpus else work.device.replace("auto", "cpu"))
        self.workers, self.share, self.say, self.patience = workers, share, say, patience
        self.seats: dict[int, Seat] = {}
        self.wanted = self._count()
        remote: Any = ray.remote  # its type stubs do not know concurrency groups
        self._new_actor = remote(
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            max_restarts=0,
            concurrency_groups={"control": 1},  # so that `end` does not wait for `do`
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(work.threads)}},
        )(Worker).remote
        self._started = self._last_ready = time.monotonic()
        self._next_word = self._started + FIRST_WORD
        self._next_look = self._paused_until = 0.0
        self._ended = self._first_is_ready = False

    @property
    def in_flight(self) -> int:
        return sum(len(seat.jobs) for seat in self.seats.values())

    @property
    def working(self) -> bool:
        """Whether any actor is ready."""
        return any(seat.ready for seat in self.seats.values())

    def fill(self, jobs: int) -> None:
        """Starts the actors that are missing for so many `jobs`, and says which wait for resources.

        Those that wait for a node that left are given up.
        """
        now = time.monotonic()
        if now < self._next_look or self._ended:
            return
        self._next_look = now + LOOK_SECONDS
        wanted = self.wanted = self._count()
        if now >= self._paused_until:
            for _ in range(min(wanted, jobs) - len(self.seats)):
                if not self._room_for_one_more():
                    break
                self._seat_one()
        for seat in [seat for seat in self.seats.values() if not seat.host][: max(0, len(self.seats) - wanted)]:
            self.remove(seat)
        self._tell_who_waits(now)

    def send(self, waiting: deque[Job]) -> None:
        """Gives jobs to ready actors, idle ones first.

        Near the end of the list no actor queues a job that another could do.
        """
        for depth in range(1, IN_FLIGHT + 1):
            for seat in self.seats.values():
                scarce = depth > 1 and len(waiting) < len(self.seats)
                if seat.ready and len(seat.calls) < depth and waiting and not scarce and not self._ended:
                    job = waiting.popleft()
                    seat.calls.append((seat.actor.do.remote(job), job))

    def next_answer(self) -> Answer | None:
        """The next call that is answered within a second. The calls of one actor are answered in order."""
        import ray

        first = {seat.calls[0][0]: seat for seat in self.seats.values() if seat.calls}
        if not first:
            time.sleep(ANSWER_SECONDS / 10)
            return None
        for reference in ray.wait(list(first), num_returns=1, timeout=ANSWER_SECONDS)[0]:
            seat = first[reference]
            _, call = seat.calls.popleft()
            try:
                return Answer(seat, call, ray.get(reference))
            except ray.exceptions.RayError as error:
                return Answer(seat, call, error)
        return None

    def welcome(self, answer: Answer) -> None:
        """Records that an actor was placed or is ready."""
        seat = answer.seat
        if answer.call == "place":
            seat.host = answer.result
            return
        seat.ready = True
        if not self._first_is_ready:
            self._first_is_ready = True
            self.say(f"the first Ray actor is ready after {time.monotonic() - self._started:.1f} s, on {seat.host}")

    def pause(self) -> None:
        """Starts no actor for a while."""
        self._paused_until = time.monotonic() + PAUSE_SECONDS

    def remove(self, seat: Seat) -> list[Job]:
        """Removes an actor. Returns the jobs that were in progress there."""
        import ray

        del self.seats[seat.number]
        if ray.is_initialized():  # else Ray would connect to any cluster of the machine
            ray.kill(seat.actor)
        self._next_look = 0.0
        return seat.jobs

    def end(self) -> None:
        """Lets the actors finish their current jobs and start no other."""
        if not self._ended:
            self._ended = True
            for seat in self.seats.values():
                seat.actor.end.options(concurrency_group="control").remote()

    def close(self) -> None:
        for seat in list(self.seats.values()):
            self.remove(seat)

    def _count(self) -> int:
        """How many actors there should be now; at least one, because an autoscaler must see a request."""
        return self.workers or max(1, carried(self.share))

    def _seat_one(self) -> None:
        number = next(number for number in range(len(self.seats) + 1) if number not in self.seats)
        seat = self.seats[number] = Seat(number, self._new_actor())
        seat.calls.append((seat.actor.place.remote(), "place"))
        seat.calls.append((seat.actor.begin.remote(self.work), "begin"))

    def _room_for_one_more(self) -> bool:
        """Whether to ask for another actor: up to a requested number always, otherwise only if resources are free.

        Other users may need the rest of the cluster. A request for all actors that could fit would make an autoscaler
        add nodes without end.
        """
        unplaced = sum(not seat.host for seat in self.seats.values())
        return bool(self.workers) or not self.seats or self.share.fits(self.share.free()) > unplaced

    def _tell_who_waits(self, now: float) -> None:
        unplaced = sum(not seat.host for seat in self.seats.values())
        if self.working:
            self._last_ready = now
        if now - self._last_ready > self.patience:
            raise StageError(
                f"no Ray actor was ready within {self.patience:.0f} s; {unplaced} of {len(self.seats)} wait for "
                f"resources, the others begin. {self._state(unplaced)}"
            )
        alone = unplaced == len(self.seats)
        if not unplaced or (alone and self._next_word == float("inf")):
            self._next_word = now + FIRST_WORD
        elif now >= self._next_word:
            self._next_word = now + NEXT_WORD if alone else float("inf")
            self.say(f"waiting for {self._state(unplaced)}")

    def _state(self, unplaced: int) -> str:
        """What was asked for, what there is, and the remedy if no node can ever have it."""
        remedy = "" if carried(self.share) else f"; no node is large enough: {self.share.remedy}"
        actors = f"{unplaced} Ray actor{'s' * (unplaced != 1)}"
        return f"{actors} of {self.share} each: the cluster has {self.share.left()}{remedy}"
