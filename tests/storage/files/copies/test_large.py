"""A large object is created only if there is none, also where a server ignores that condition of uploads in parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nfm.storage.errors import StorageError
from nfm.storage.files import atomic, clouds, remote
from nfm.storage.files.copies import large, mirror
from nfm.storage.files.paths import as_path, names_in
from nfm.storage.files.small_files import read_bytes
from tests.support.buckets.s3server import S3, s3_alone

if TYPE_CHECKING:
    from pathlib import Path

FIRST, SECOND = b"the first one", b"another one"


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for cloud in clouds.CLOUDS.values():
        monkeypatch.setattr(cloud, "PARTS", 1)


@s3_alone
@pytest.mark.parametrize("ignored", [False, True], ids=["kept to", "ignored for parts"])
def test_what_is_there_stays_whatever_the_server_does_with_the_condition_of_parts(
    ignored: bool, s3: S3, bucket: str
) -> None:
    if ignored:
        s3.fail("if-none-match", method="POST", times=100)
    path = as_path(f"{bucket}/run/one")
    assert atomic.create_bytes(path, FIRST)
    assert not atomic.create_bytes(path, SECOND)
    assert read_bytes(path) == FIRST
    assert names_in(as_path(f"{bucket}/run")) == ["one"]
    assert large._keeps[bucket.removeprefix("s3://")] is not ignored
    assert s3.count("POST", "uploads") == 1, "it is asked once"


@s3_alone
@pytest.mark.parametrize("ignored", [False, True], ids=["kept to", "ignored for parts"])
def test_what_another_process_put_there_meanwhile_is_not_put_over(
    ignored: bool, s3: S3, bucket: str, tmp_path: Path
) -> None:
    """Ceph's gateway looks neither at the condition of parts nor at that of a removal. So nothing is removed there."""
    if ignored:
        s3.fail("if-none-match", method="POST", times=100)
    artifact = as_path(f"{bucket}/run/student/ab12")
    (artifact / "weights").write_bytes(b"of an attempt that died")
    (tmp_path / "weights").write_bytes(FIRST)
    digests = {"weights": atomic.hash_file(tmp_path / "weights")}

    def taken_over() -> None:
        (artifact / "weights").write_bytes(b"of who has the lock now")

    with pytest.raises(StorageError, match="another process writes it"):
        mirror.push(artifact, tmp_path, digests, taken_over)
    assert read_bytes(artifact / "weights") == b"of who has the lock now"
    mirror.push(artifact, tmp_path, digests, lambda: None)
    assert read_bytes(artifact / "weights") == FIRST


@pytest.mark.parametrize("s3", ["gs", "az"], indirect=True)
def test_what_is_there_stays_in_other_clouds_too(s3: S3, bucket: str, tmp_path: Path) -> None:
    """fake-gcs-server does not look at the condition of an upload in parts; Azurite does."""
    (tmp_path / "large").write_bytes(b"1" * (6 << 20))
    artifact = as_path(f"{bucket}/run/student/ab12")
    digests = {"large": atomic.hash_file(tmp_path / "large")}
    mirror.push(artifact, tmp_path, digests, lambda: None)
    assert not atomic.create_bytes(artifact / "large", SECOND)
    (tmp_path / "large").write_bytes(b"2" * (6 << 20))
    with pytest.raises(FileExistsError):
        remote.attempt(artifact / "large", "write", lambda fs, name: large.put_new(fs, name, str(tmp_path / "large")))
    assert atomic.hash_file(artifact / "large") == digests["large"]


@s3_alone
def test_a_file_is_put_whole_or_refused_by_its_size(
    s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.fail("if-none-match", method="POST", times=100)
    (tmp_path / "weights").write_bytes(FIRST)
    artifact = as_path(f"{bucket}/run/student/ab12")
    digests = {"weights": atomic.hash_file(tmp_path / "weights")}
    mirror.push(artifact, tmp_path, digests, lambda: None)
    assert read_bytes(artifact / "weights") == FIRST
    monkeypatch.setattr(clouds.CLOUDS["s3"], "MOST", len(FIRST) - 1)
    with pytest.raises(
        StorageError, match=r"13 bytes, and this object store creates an object only if there is none when .* 12 bytes"
    ):
        mirror.push(as_path(f"{bucket}/run/student/cd34"), tmp_path, digests, lambda: None)
