"""The table of executors: where units of work are done, and how lost workers are handled.

A new executor is one line in the table and one file with a function as described in `executors.jobs`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Executor:
    """`run`, as `module:function`, is called with (work, jobs, workers, halt) and yields outcomes.

    An executor with a Ray `cluster` also takes `address` and `say`. With `later`, other tasks do the work, and the
    stage only collects what they committed. `again` tells the user what to do about missing jobs.
    """

    run: str
    cluster: bool = False
    later: bool = False
    again: str = "run the same command again"


EXECUTORS = {
    "ray": Executor("nfm.stages.executors.ray:run", cluster=True),
    "serial": Executor("nfm.stages.executors.serial:run"),
    "slurm": Executor("nfm.stages.executors.slurm:run", later=True, again="run `nfm submit pairs --slurm` again"),
}
