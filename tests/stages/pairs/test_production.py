"""What is kept of failed shards, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nfm.stages.executors.jobs import Job, Outcome
from nfm.stages.executors.outcomes import failure_path, lacking_pieces
from nfm.stages.pairs.production import produce
from nfm.storage.errors import StorageError
from nfm.storage.files.paths import as_path, exists
from nfm.storage.ledger import commits
from tests.stages.pairs.shop import Shop
from tests.support.buckets.s3server import S3
from tests.support.recorder import Recorder


def test_a_traceback_goes_when_its_shard_is_made_and_others_cost_no_request(
    shop: Shop,
    bucket: str,
    s3: S3,
) -> None:
    store = shop.make(shop.config(coupling="independent"))
    out = as_path(f"{bucket}/store")
    made = [Outcome(Job(name, "a"), commits.read(store.root, name)) for name in ("d000-s00000", "d000-s00001")]
    produce(out, [Outcome(made[1].job, error="OSError: once")], 16, Recorder(), 0, 2)
    assert exists(failure_path(out, "d000-s00001"))
    produce(out, made, 16, Recorder(), 0, 2)
    assert not exists(failure_path(out, "d000-s00001"))
    assert s3.count("DELETE") == 1


def test_an_executor_has_ended_before_what_was_raised_meanwhile_goes_on(tmp_path: Path) -> None:
    ended = []

    def outcomes() -> Iterator[Outcome | None]:
        try:
            yield Outcome(Job("d000-s00000", "a"), error="OSError: once")
        finally:
            ended.append("the executor")

    given = outcomes()  # held, so that only the code can end it
    (tmp_path / "failed").write_text("no folder")
    with pytest.raises(StorageError, match="cannot write"):
        produce(tmp_path, given, 16, Recorder(), 0, 2)
    assert ended == ["the executor"]


def test_a_reason_is_told_once_with_the_first_pieces_that_it_stopped(tmp_path: Path) -> None:
    names = [f"d000-s{shard:05d}" for shard in range(9)]
    errors = ["ValueError: no such kernel"] * 7 + ["OSError: once"]
    produce(tmp_path, [Outcome(Job(n, "a"), error=e) for n, e in zip(names, errors)], 16, Recorder(), 0, 9)
    told = str(lacking_pieces(tmp_path, names, 12, "shards"))
    first = ", ".join(names[:5])
    assert told.startswith(
        f"9 of 12 shards are missing: {first} and 2 more (ValueError: no such kernel), {names[7]} (OSError: once), "
        f"{names[8]} (not made yet). What failed has its traceback in {tmp_path / 'failed'}; the others are committed."
    )
