"""From outcomes to a store that can be sealed: pending shards, progress, failed shards, and what may be missing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nfm.stages.base import Reporter, StageError
from nfm.stages.executors.jobs import Outcome
from nfm.stages.executors.outcomes import all_failed, lacking_pieces, settled
from nfm.storage.format.spec import StoreSpec, parse_name
from nfm.storage.ledger import seal


def pending(out: Path, spec: StoreSpec, draws: int) -> list[str]:
    """The names of the shards that have no commit yet, in order."""
    return seal.pending(out, spec, draws)


def records_of(spec: StoreSpec, names: Iterable[str]) -> int:
    """The number of pairs in these shards."""
    return sum(len(spec.slots_of(parse_name(name)[1])) for name in names)


def produce(
    out: Path, outcomes: Iterable[Outcome | None], batch_size: int, report: Reporter, done: int, total: int
) -> list[Outcome]:
    """Handles the outcomes of an executor, with `done` of `total` pairs complete at the start. Returns the failures."""
    smallest = batch_size

    def tell_halved(outcome: Outcome) -> None:
        nonlocal smallest
        used = outcome.commit.batch_size
        if used is not None and used < smallest:
            smallest = used
            report.log("OUT_OF_MEMORY", shard=outcome.commit.name, batch_size=used, worker=outcome.worker)
            report.say(
                f"{outcome.commit.name}: out of memory in batches of {batch_size}, encoded in batches of {used}, "
                "which its commit says; last bits of its noise may differ"
            )

    return settled(out, outcomes, report, done, total, "pairs", also=tell_halved)


def missing(out: Path, names: list[str], total: int, pairs: int, allowed: int, again: str) -> StageError:
    """The error for a store that lacks more than it may. `again` is how to retry."""
    limit = f", pairs.max_missing allows {allowed:,}" if allowed else ""
    leave_out = "; or let the generation lack them with --set pairs.max_missing=N" if all_failed(out, names) else ""
    return lacking_pieces(out, names, total, "shards", again, f", {pairs:,} pairs{limit}", leave_out)
