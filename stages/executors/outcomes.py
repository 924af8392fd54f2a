"""From the outcomes of an executor to progress, and to the tracebacks of failed jobs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nfm.stages.base import Reporter, StageError
from nfm.stages.executors.jobs import Outcome, last_line
from nfm.stages.executors.tally import Tally
from nfm.storage.errors import StorageError
from nfm.storage.errors.masked import masked
from nfm.storage.files import atomic
from nfm.storage.files.paths import exists, inside, names_in, remove
from nfm.storage.files.small_files import read_tail

_LOOKED_AT = 200  # tracebacks of pieces that are missing, at most
_LISTED = 5  # reasons, and pieces that are missing for one of them
_TAIL_BYTES = 1 << 16  # of a traceback, whose last line is reported


def settled(
    out: Path,
    outcomes: Iterable[Outcome | None],
    report: Reporter,
    done: int,
    total: int,
    unit: str,
    count: Callable[[Any], int] = lambda commit: int(commit.records),
    also: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Handles outcomes, with `done` of `total` units complete at the start. Returns the failures.

    A commit is `count` units. The traceback of a failed job is written to `failed/NAME.txt`, until a later run does the
    job. `also` is called with each outcome that has a commit.
    """
    failures: list[Outcome] = []
    told: set[str] = set()
    failed_before = set(names_in(out / "failed"))  # so that other jobs cost no request to remove nothing
    tally = Tally()
    with _closed(outcomes):
        report.progress(done, total, unit)
        for outcome in outcomes:
            if outcome is None:
                pass
            elif outcome.commit is None:
                failures.append(outcome)
                _set_aside(out, outcome, report, told)
            else:
                done += count(outcome.commit)
                tally.add(outcome)
                if (failure := failure_path(out, outcome.job.name)).name in failed_before:
                    remove(failure)
                report.log("COMMIT", shard=outcome.commit.name, seconds=outcome.commit.seconds, worker=outcome.worker)
                also(outcome)
            report.progress(done, total, unit, tally.rows(), failed=len(failures))
    return failures


@contextmanager
def _closed(outcomes: Iterable[Outcome | None]) -> Iterator[None]:
    """Ends the executor before anything that is raised goes on.

    Left to itself it ends with the process, after its cluster, and Ray then connects to any cluster of the machine.
    """
    try:
        yield
    finally:
        if isinstance(outcomes, Generator):
            outcomes.close()


def failure_path(out: Path, name: str) -> Path:
    """The path of a failed shard's traceback."""
    return out / "failed" / f"{name}.txt"


def reasons(out: Path, names: Iterable[str]) -> dict[str, str]:
    """Why each of these shards is missing: the last line of its traceback, if it was tried."""
    found = {}
    for name in names:
        path = failure_path(out, name)
        found[name] = _reason(path, out) if exists(path) else "not made yet"
    return found


def lacking_pieces(
    out: Path,
    names: Sequence[str],
    total: int,
    what: str,
    again: str = "run the same command again",
    counted: str = "",
    otherwise: str = "",
) -> StageError:
    """The error of work that ended without some of its pieces: each reason once, with the first pieces that it stopped.

    `again` is how to retry, `counted` says how much is missing in other words, `otherwise` what else can be done.
    """
    pieces: dict[str, list[str]] = {}
    for name, reason in reasons(out, names[:_LOOKED_AT]).items():
        pieces.setdefault(reason, []).append(name)
    listed = dict(list(pieces.items())[:_LISTED])
    why = ", ".join(f"{_some(stopped)} ({reason})" for reason, stopped in listed.items())
    left = len(names) - sum(map(len, listed.values()))
    more = f" and {left:,} more" if left else ""
    where = f"What failed has its traceback in {out / 'failed'}; the" if names_in(out / "failed") else "The"
    return StageError(
        f"{len(names)} of {total} {what} are missing{counted}: {why}{more}. {where} others are committed. Mend the "
        f"cause and {again}, which makes only these{otherwise}"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else "")


def all_failed(out: Path, names: Iterable[str]) -> bool:
    """Whether each of these was tried and failed. Shards that were not tried yet may not be left out."""
    tried = set(names_in(out / "failed"))
    return all(failure_path(out, name).name in tried for name in names)


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
