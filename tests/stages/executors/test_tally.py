"""The work of each worker: shares of the time since it started, only for workers that are still there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from nfm.stages.executors.jobs import Job, Outcome, Timing
from nfm.stages.executors.tally import GONE_SECONDS, Tally

JOB = Job("d000-s00000", "a1")


def done(worker: str, records: int, timing: Timing) -> Outcome:
    commit: Any = SimpleNamespace(records=records)
    return Outcome(JOB, commit=commit, worker=worker, timing=timing)


def test_rates_and_shares_are_of_the_time_since_a_worker_began() -> None:
    now = [100.0]
    tally = Tally(lambda: now[0])
    tally.add(done("a/0", 400, Timing(wall=4, read=1, encode=3, write=2)))  # began at 96
    now[0] = 106
    tally.add(done("a/0", 400, Timing(wall=4, read=1, encode=3, write=2)))
    (row,) = tally.rows()
    assert row == {
        "worker": "a/0", "shards": 2, "per_second": 80.0, "read": 0.2, "encode": 0.6, "write": 0.4, "wait": 0.2,
    }  # fmt: skip


def test_a_failed_shard_counts_for_no_worker() -> None:
    tally = Tally()
    tally.add(Outcome(JOB, error="Traceback", worker="a/0"))
    assert tally.rows() == []


def test_a_lost_worker_is_not_shown_and_one_with_long_shards_is() -> None:
    now = [0.0]
    tally = Tally(lambda: now[0])
    tally.add(done("short", 10, Timing(wall=1, encode=1)))
    tally.add(done("long", 10, Timing(wall=300, encode=300)))
    now[0] = GONE_SECONDS + 1
    assert [row["worker"] for row in tally.rows()] == ["long"]
    now[0] = 1201
    assert tally.rows() == []
