"""From outcomes to a store that can be sealed: pending shards, progress, failed shards, and what may be missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from nfm.stages.base import Reporter, StageError
from nfm.stages.executors.jobs import Job, Outcome, last_line, new_attempt
from nfm.stages.executors.tally import Tally
from nfm.storage.errors import StorageError
from nfm.storage.errors.masked import masked
from nfm.storage.files import atomic
from nfm.storage.files.paths import exists, inside, names_in, remove
from nfm.storage.files.small_files import read_tail
from nfm.storage.format.spec import StoreSpec, parse_name
from nfm.storage.ledger import seal

_LISTED = 5
_LOOKED_AT = 1000  # tracebacks of failed shards, at most
_TAIL_BYTES = 1 << 16  # of a traceback, whose last line is reported


def pending(out: Path, spec: StoreSpec, draws: int) -> list[str]:
    """The names of the shards that have no commit yet, in order."""
    return seal.pending(out, spec, draws)


def jobs(names: Iterable[str]) -> Iterator[Job]:
    """A new attempt for each."""
    return (Job(name, new_attempt()) for name in names)


def records_of(spec: StoreSpec, names: Iterable[str]) -> int:
    """The number of pairs in these shards."""
    return sum(len(spec.slots_of(parse_name(name)[1])) for name in names)


def produce(
    out: Path, outcomes: Iterable[Outcome | None], batch_size: int, report: Reporter, done: int, total: int
) -> list[Outcome]:
    """Handles the outcomes of an executor, with `done` of `total` pairs complete at the start. Returns the failures.

    The traceback of a failed shard is written to `failed/NAME.txt`, until a later run makes the shard.
    """
    failures: list[Outcome] = []
    told: set[str] = set()
    failed_before = set(names_in(out / "failed"))  # so that other shards cost no request to remove nothing
    tally = Tally()
    smallest = batch_size
    report.progress(done, total, "pairs")
    for outcome in outcomes:
        if outcome is None:
            pass
        elif outcome.commit is None:
            failures.append(outcome)
            _set_aside(out, outcome, report, told)
        else:
            done += outcome.commit.records
            tally.add(outcome)
            if (failure := failure_path(out, outcome.job.name)).name in failed_before:
                remove(failure)
            report.log("COMMIT", shard=outcome.commit.name, seconds=outcome.commit.seconds, worker=outcome.worker)
            used = outcome.commit.batch_size
            if used is not None and used < smallest:
                smallest = used
                report.log("OUT_OF_MEMORY", shard=outcome.commit.name, batch_size=used, worker=outcome.worker)
                report.say(
                    f"{outcome.commit.name}: out of memory in batches of {batch_size}, encoded in batches of {used}, "
                    "which its commit says; last bits of its noise may differ"
                )
        report.progress(done, total, "pairs", tally.rows(), failed=len(failures))
    return failures


def failure_path(out: Path, name: str) -> Path:
    """The path of a failed shard's traceback."""
    return out / "failed" / f"{name}.txt"


def reasons(out: Path, names: Iterable[str]) -> dict[str, str]:
    """Why each of these shards is missing: the last line of its traceback, if it was tried."""
    found = {}
    for name in names:
        path = failure_path(out, name)
        found[name] = _reason(path, out) if exists(path) else "not encoded yet"
    return found


def all_failed(out: Path, names: Iterable[str]) -> bool:
    """Whether each of these was tried and failed. Shards that were not tried yet may not be left out."""
    tried = set(names_in(out / "failed"))
    return all(failure_path(out, name).name in tried for name in names)


def missing(out: Path, names: list[str], total: int, pairs: int, allowed: int, again: str) -> StageError:
    """The error for a store that lacks more than it may. `again` is how to retry."""
    shards: dict[str, list[str]] = {}
    for name, reason in reasons(out, names[:_LOOKED_AT]).items():
        shards.setdefault(reason, []).append(name)
    why = [f"{_some(shards[reason])} ({reason})" for reason in list(shards)[:_LISTED]]
    left = len(names) - sum(len(shards[reason]) for reason in list(shards)[:_LISTED])
    more = f" and {left:,} more" if left else ""
    limit = f", pairs.max_missing allows {allowed:,}" if allowed else ""
    told = f"What failed has its traceback in {out / 'failed'}; the other" if names_in(out / "failed") else "The other"
    leave_out = "; or let the generation lack them with --set pairs.max_missing=N" if all_failed(out, names) else ""
    lacking = f"{len(names)} of {total} shards are missing, {pairs:,} pairs{limit}: {', '.join(why)}{more}"
    return StageError(
        f"{lacking}. {told} shards are committed. Mend the cause and {again}, which makes only these{leave_out}"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else "")


def _set_aside(out: Path, outcome: Outcome, report: Reporter, told: set[str]) -> None:
    """Keeps the traceback. Its last line is reported only once, however many shards fail with it."""
    error = masked(outcome.error or "no message")
    inside(out, "failed")  # raises if a link would lead out of the store
    atomic.write_bytes(failure_path(out, outcome.job.name), error.encode())
    reason = last_line(error)
    if reason not in told:
        told.add(reason)
        report.say(f"{outcome.job.name} failed and is set aside: {reason}")
    report.log("SHARD_FAILED", shard=outcome.job.name, error=error, worker=outcome.worker)


def _reason(path: Path, out: Path) -> str:
    try:
        return last_line(read_tail(path, _TAIL_BYTES, root=out).decode(errors="replace"))
    except (StorageError, OSError) as error:
        return f"its traceback cannot be read: {error}"
