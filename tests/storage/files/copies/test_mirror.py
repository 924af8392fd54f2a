"""A mirror: what a stage made reaches the bucket whole, and another machine gets exactly that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nfm.storage.errors import CorruptShard, MissingShard, StorageError
from nfm.storage.files import atomic
from nfm.storage.files.copies import mirror
from nfm.storage.files.paths import names_in, remove, size_of
from tests.support.buckets.s3server import S3

FILES = {"one.bin": b"one" * 1000, "deep/two.bin": b"two", "checkpoints/3/state": b"not needed by others", "empty": b""}


def no_check() -> None:
    pass


def made(artifact: Path, files: dict[str, bytes] = FILES) -> dict[str, tuple[str, int]]:
    """Makes files in the folder of the artifact on this machine; their digests."""
    folder = mirror.prepare(artifact)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return {name: atomic.hash_file(folder / name) for name in files}


def finish(artifact: Path, digests: dict[str, tuple[str, int]]) -> None:
    mirror.push(artifact, mirror.local_folder(artifact), digests, no_check)
    files = [{"path": name, "sha256": sha, "bytes": size} for name, (sha, size) in digests.items()]
    atomic.create_json(artifact / "manifest.json", {"files": files})


def on_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NFM_SCRATCH", str(tmp_path / "another"))


def test_what_was_made_here_is_found_there_and_is_brought_once(
    artifact: Path, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(artifact, made(artifact))
    on_another_machine(monkeypatch, tmp_path)
    folder = mirror.pull(artifact)
    assert folder.is_relative_to(tmp_path / "another")
    for name, data in FILES.items():
        if not name.startswith("checkpoints/"):
            assert (folder / name).read_bytes() == data
    assert not (folder / "checkpoints").exists()
    assert atomic.read_json(folder / "manifest.json") == atomic.read_json(artifact / "manifest.json")
    assert mirror.origin(folder) == str(artifact)
    asked = s3.count("GET", "one.bin")
    assert mirror.pull(artifact) == folder
    assert s3.count("GET", "one.bin") == asked


def test_a_file_that_is_damaged_on_the_way_is_brought_again_and_one_that_stays_damaged_is_named(
    artifact: Path, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")  # as where the store has no checksums
    finish(artifact, made(artifact))
    on_another_machine(monkeypatch, tmp_path)
    s3.fail("flip", "one.bin", method="GET", times=2)
    assert (mirror.pull(artifact) / "one.bin").read_bytes() == FILES["one.bin"]
    (artifact / "one.bin").write_bytes(b"two" * 1000)
    monkeypatch.setenv("NFM_SCRATCH", str(tmp_path / "third"))
    with pytest.raises(CorruptShard, match=rf"{artifact}/one\.bin: SHA-256 .*restore it"):
        mirror.pull(artifact)
    remove(artifact / "one.bin")
    with pytest.raises(MissingShard, match=rf"{artifact}/one\.bin: its manifest lists it"):
        mirror.pull(artifact)
    assert not (mirror.local_folder(artifact) / "one.bin").exists()


def test_files_of_this_machine_that_are_not_the_committed_ones_are_replaced(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(artifact, made(artifact))
    on_another_machine(monkeypatch, tmp_path)
    made(artifact, {"one.bin": b"eno" * 1000, "deep/two.bin": b"of a run that was stopped"})
    folder = mirror.pull(artifact)
    assert (folder / "one.bin").read_bytes() == FILES["one.bin"]
    (folder / "deep/two.bin").unlink()
    assert (mirror.pull(artifact) / "deep/two.bin").read_bytes() == b"two"


def test_what_an_unfinished_attempt_left_is_replaced_only_by_who_holds_the_lock(artifact: Path) -> None:
    (artifact / "one.bin").write_bytes(b"of an attempt that died")
    digests = made(artifact, {"one.bin": FILES["one.bin"]})

    def lost() -> None:
        raise StorageError("another process took the work over")

    with pytest.raises(StorageError, match="took the work over"):
        mirror.push(artifact, mirror.local_folder(artifact), digests, lost)
    assert (artifact / "one.bin").read_bytes() == b"of an attempt that died"
    mirror.push(artifact, mirror.local_folder(artifact), digests, no_check)
    assert atomic.hash_file(artifact / "one.bin") == digests["one.bin"]
    mirror.push(artifact, mirror.local_folder(artifact), digests, lost)  # the same bytes: nothing is to be replaced


def test_what_another_process_put_there_meanwhile_stays_where_a_removal_has_no_condition(
    artifact: Path, s3: S3
) -> None:
    """As on Ceph's gateway, which removes whatever is there: the work was taken over after the look at the lock."""
    (artifact / "one.bin").write_bytes(b"of an attempt that died")
    digests = made(artifact, {"one.bin": FILES["one.bin"]})

    def taken_over() -> None:
        (artifact / "one.bin").write_bytes(b"of who has the lock now")

    with pytest.raises(StorageError, match="another process writes it"):
        mirror.push(artifact, mirror.local_folder(artifact), digests, taken_over)
    assert (artifact / "one.bin").read_bytes() == b"of who has the lock now"
    assert s3.count("DELETE", "one.bin") == 0


@pytest.mark.parametrize("kind", ["lose", "reset", "error"])
def test_lost_answers_lose_no_file(kind: Any, artifact: Path, s3: S3) -> None:
    digests = made(artifact)
    for name in FILES:
        s3.fail(kind, name, method="PUT", times=2)
    finish(artifact, digests)
    assert {name: (atomic.hash_file(artifact / name)) for name in FILES} == digests


def test_a_local_artifact_is_its_own_folder(tmp_path: Path) -> None:
    assert mirror.local_folder(tmp_path) == mirror.prepare(tmp_path) == mirror.pull(tmp_path) == tmp_path
    assert mirror.origin(tmp_path) == str(tmp_path)
    assert names_in(tmp_path) == []
    assert size_of(tmp_path / "spec.json") is None
