"""The table of executors: where units of work are done, and how lost workers are handled.

A new executor is one line in the table and one file with a function as described in `executors.jobs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from nfm.stages.base import Reporter, call
from nfm.stages.executors.jobs import Job, Outcome, Work


@dataclass(frozen=True)
class Executor:
    """`run`, as `module:function`, is called with (work, jobs, workers, halt) and yields outcomes.

    An executor with a Ray `cluster` also takes `address` and `say`. With `later`, other tasks do the work, and the
    stage only collects what they committed.
    """

    run: str
    cluster: bool = False
    later: bool = False
    once_more: str = "run the same command again"

    def again(self, stage: str) -> str:
        """What the user of a stage does about missing jobs."""
        return self.once_more.format(stage=stage)


EXECUTORS = {
    "ray": Executor("nfm.stages.executors.ray:run", cluster=True),
    "serial": Executor("nfm.stages.executors.serial:run"),
    "slurm": Executor("nfm.stages.executors.slurm:run", later=True, once_more="run `nfm submit {stage} --slurm` again"),
}


def run(config: Any, work: Work, jobs: Iterable[Job], report: Reporter) -> Iterator[Outcome | None]:
    """Does the jobs on the executor of a section, with its `executor`, `workers` and `ray_address`."""
    executor = EXECUTORS[config.executor]
    more = {"address": config.ray_address, "say": report.say} if executor.cluster else {}
    outcomes: Iterator[Outcome | None] = call(executor.run, work, jobs, config.workers, report, **more)
    return outcomes
