"""States of unfinished work: another machine goes on from the newest whole one, and only that one is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from nfm.storage.errors import StorageError
from nfm.storage.files.copies import mirror
from nfm.storage.files.copies.resume import Resume
from nfm.storage.files.paths import names_in
from tests.support.buckets.s3server import S3


def states(artifact: Path) -> Resume:
    return Resume(mirror.prepare(artifact), lambda: None)


def files(tmp_path: Path, text: str) -> dict[str, Path]:
    made = {}
    for name in ("weights", "log"):
        made[name] = tmp_path / f"{text}-{name}"
        made[name].write_text(f"{text} {name}")
    return made


def test_another_machine_goes_on_from_the_newest_state_and_the_older_ones_are_removed(
    artifact: Path, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert states(artifact).newest() == 0
    work = states(artifact)
    snapshot = mirror.local_folder(artifact) / "snapshots" / "50"
    snapshot.parent.mkdir()
    snapshot.write_text("at 50")
    work.put(100, files(tmp_path, "early"), ["snapshots/50"])
    asked = s3.count("PUT", "snapshots/50")
    work.put(200, files(tmp_path, "late"), ["snapshots/50"])
    assert s3.count("PUT", "snapshots/50") == asked == 1
    assert len(names_in(artifact / "resume")) == 1
    monkeypatch.setenv("NFM_SCRATCH", str(tmp_path / "two"))
    there = states(artifact)
    assert there.newest() == 200
    folder = mirror.local_folder(artifact) / "checkpoints" / "200"
    folder.parent.mkdir()
    there.bring(folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"weights": "late weights", "log": "late log"}
    assert (mirror.local_folder(artifact) / "snapshots" / "50").read_text() == "at 50"
    there.clear()
    assert names_in(artifact) == ["snapshots", "spec.json"]


def test_a_state_that_was_not_put_to_its_end_is_none_and_goes_with_the_next(
    artifact: Path, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states(artifact).put(100, files(tmp_path, "early"))
    monkeypatch.setenv("NFM_PATIENCE", "0.1")
    s3.fail("reset", "files.json", method="PUT", times=100)
    with pytest.raises(StorageError, match=r"resume/000000000200-\w+/files\.json: cannot write"):
        states(artifact).put(200, files(tmp_path, "late"))
    s3.faults.clear()
    assert states(artifact).newest() == 100
    states(artifact).put(300, files(tmp_path, "later"))
    assert [name.partition("-")[0] for name in names_in(artifact / "resume")] == ["000000000300"]


def test_who_lost_the_lock_puts_nothing(artifact: Path, tmp_path: Path) -> None:
    def lost() -> None:
        raise StorageError("another process took the work over")

    with pytest.raises(StorageError, match="took the work over"):
        Resume(mirror.prepare(artifact), lost).put(100, files(tmp_path, "late"))
    assert names_in(artifact) == ["spec.json"]


def test_work_in_a_local_folder_has_no_states_elsewhere(tmp_path: Path) -> None:
    resume = Resume(tmp_path, lambda: None)
    resume.put(100, {})
    resume.clear()
    assert resume.newest() == 0
    assert names_in(tmp_path) == []
