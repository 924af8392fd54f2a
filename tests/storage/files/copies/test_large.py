"""A large object is created only if there is none, also where a server ignores that condition of uploads in parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.files.copies import large, mirror
from nfm.storage.files.paths import as_path, names_in
from nfm.storage.files.small_files import read_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.s3server import S3

FIRST, SECOND = b"the first one", b"another one"


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "PARTS", 1)


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


def test_a_file_is_put_whole_or_refused_by_its_size(
    s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.fail("if-none-match", method="POST", times=100)
    (tmp_path / "weights").write_bytes(FIRST)
    artifact = as_path(f"{bucket}/run/student/ab12")
    digests = {"weights": atomic.hash_file(tmp_path / "weights")}
    mirror.push(artifact, tmp_path, digests, lambda: None)
    assert read_bytes(artifact / "weights") == FIRST
    monkeypatch.setattr(large, "MOST", len(FIRST) - 1)
    with pytest.raises(
        StorageError, match=r"13 bytes, and this object store keeps to If-None-Match only for .* 12 bytes"
    ):
        mirror.push(as_path(f"{bucket}/run/student/cd34"), tmp_path, digests, lambda: None)
