"""Where shards are encoded, and what becomes of workers: a table, and a file an executor.

A new executor is a line of the table and a file of its own, with a function as `encoding.jobs` describes it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Executor:
    """`run`, as `module:function`, is called with (setup, jobs, workers, halt) and yields outcomes.

    One of a Ray `cluster` also takes `address` and `say`. Where tasks elsewhere encode, `later`, the pairs stage only
    seals what they committed; `again` says what a person does about shards that are missing.
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
