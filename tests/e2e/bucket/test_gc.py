"""gc in a bucket: what goes in a folder goes there, and what stays stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nfm.pipeline.upkeep import gc, needed
from nfm.storage.files import atomic
from nfm.storage.files.folder import below
from nfm.storage.files.paths import as_path, names_in
from nfm.storage.verify import verify

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Lab
    from tests.support.buckets.in_bucket import Bucket

OTHER = '[data]\nsource = "digits"\nlimit = 321\n'  # a config in use that reaches nothing there


@pytest.fixture
def aged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can make an object old: what is older than now counts as left for an hour."""
    for module in (gc, needed):
        monkeypatch.setattr(module, "IDLE_SECONDS", -3600.0)


def objects(root: Path) -> set[str]:
    """All objects but locks, which stay."""
    return {name for name in below(root) if not name.endswith("/lock.json")}


@pytest.mark.seconds(60)
def test_gc_of_a_bucket_removes_what_is_not_needed_and_keeps_the_rest(made: Lab, there: Bucket, aged: None) -> None:
    there.upload(made, "data", "teacher", "pairs", "student", baselines=True)
    root, name = as_path(there.url), made.name("pairs", "independent")
    store = root / made.name("pairs")
    attempt = names_in(store / "shards")[0].split(".")[0] + ".killed"
    for left in (f"shards/{attempt}.tar", f"index/{attempt}.parquet"):
        (store / left).write_bytes(b"half a shard")
    (root / made.name("teacher") / "resume/000000000512-01234567/state").write_bytes(b"of a training that ended")
    for file in below(root / made.name("student", "independent")):
        (root / made.name("student", "independent") / file).unlink()
    (there.lab.folder / "other.toml").write_text(OTHER)
    before = below(root)
    given = ("gc", "-c", "other.toml", "--older-than", "0")
    told = there.nfm(*given, "--dry-run").stdout
    assert "would go: 1 attempt, 1 state, 1 artifact: " in told
    assert below(root).keys() == before.keys(), "looking writes nothing, not even a lock"
    assert "removed 1 attempt, 1 state, 1 artifact: " in there.nfm(*given, "--yes").stdout
    gone = {file for file in before if file.startswith(f"{name}/") or "killed" in file or "/resume/" in file}
    assert objects(root) == {file for file in before if not file.endswith("/lock.json")} - gone
    assert verify(store, level="default") == []


@pytest.mark.seconds(60)
def test_a_store_that_a_worklist_of_a_submission_names_stays(made: Lab, there: Bucket, aged: None) -> None:
    there.upload(made, "data", "pairs", baselines=True)
    (there.lab.folder / "other.toml").write_text(OTHER)
    queued = as_path(there.url) / "submissions/0123-001/worklist.json"
    atomic.create_json(queued, {"store": f"{there.url}/{made.name('pairs')}"})
    told = there.nfm("gc", "-c", "other.toml", "--older-than", "0", "--yes").stdout
    assert made.name("pairs") not in told
    assert made.name("pairs", "independent") in told
    assert names_in(as_path(there.url) / "pairs" / made.only("pairs").path.name) != []
