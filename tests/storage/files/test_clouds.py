"""What the stores of other clouds than S3's answer is understood: what is missing, denied or gone, and what to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nfm.storage.errors import Misused, StorageError
from nfm.storage.files import atomic, folder
from nfm.storage.files.paths import as_path, exists, names_in, remove_below, size_below, size_of
from tests.support.buckets.s3server import S3, new_clients

pytestmark = pytest.mark.parametrize("s3", ["gs", "az"], indirect=True)


def test_a_folder_is_listed_moved_and_removed(s3: S3, bucket: str) -> None:
    root = as_path(f"{bucket}/run")
    assert names_in(root) == []
    assert not exists(root)
    assert size_of(root / "a") is None
    assert folder.below(root) == {}
    for name in ("a", "deep/b", "deep/er/c"):
        atomic.write_bytes(root / name, name.encode())
    assert names_in(root) == ["a", "deep"]
    assert names_in(root / "deep") == ["b", "er"]
    assert size_of(root / "deep/b") == 6
    assert size_of(root / "deep") is None
    assert size_below(root) == 1 + 6 + 9
    found = folder.below(root)
    assert sorted(found) == ["a", "deep/b", "deep/er/c"]
    first = found["a"]
    assert first.tag
    atomic.write_bytes(root / "a", b"A")
    again = folder.objects_in(root)["a"]
    assert again.tag != first.tag
    assert first.changed <= again.changed
    atomic.place(root / "deep/b", root / "b")
    assert names_in(root) == ["a", "b", "deep"]
    remove_below(root)
    assert names_in(root) == []


def test_what_is_lost_is_asked_again_and_what_stays_wrong_names_the_url_and_the_remedy(
    s3: S3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_path(f"{bucket}/run/one")
    for kind in ("reset", "error", "lose"):
        s3.fail(kind, "run/one", method="PUT")  # type: ignore[arg-type]
    assert atomic.create_bytes(path, b"first")
    monkeypatch.setenv("NFM_PATIENCE", "0.2")
    s3.fail("error", "run/one", method="PUT", times=100, status=503)
    with pytest.raises(StorageError, match=rf"{path}: cannot write .*the object store kept failing for 0 s"):
        atomic.write_bytes(path, b"second")
    s3.faults.clear()
    s3.fail("error", "run/one", method="PUT", times=1, status=403, code="AuthorizationFailure")
    with pytest.raises(StorageError, match=rf"{path}: cannot write .*access is denied: check the credentials"):
        atomic.write_bytes(path, b"second")
    for write in (atomic.write_bytes, atomic.create_bytes):
        with pytest.raises(Misused, match=r"://nowhere-at-all/x: cannot write .*no such bucket: create it"):
            write(f"{s3.scheme}://nowhere-at-all/x", b"one")


def test_half_of_what_a_server_says_of_an_object_is_asked_again_and_told_if_it_stays_so(s3: S3, bucket: str) -> None:
    if s3.scheme == "az":
        pytest.skip("its server says it in headers, which cannot be cut")
    path = as_path(f"{bucket}/run/one")
    atomic.write_bytes(path, b"first")
    s3.fail("shrink", "run/one", method="GET")
    assert size_of(path) == 5
    s3.fail("shrink", "run/one", method="GET", times=100)
    with pytest.raises(StorageError, match=rf"{path}: cannot look at .*check the URL and the endpoint"):
        size_of(path)
    assert s3.count("GET", "run/one") < 12  # three times, and gcsfs makes several requests of one


def test_no_credentials_are_told_with_what_to_set(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    if s3.scheme == "gs":
        pytest.skip("gcsfs goes on without any, and is denied access")
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    new_clients()
    try:
        with pytest.raises(StorageError, match=r"no usable credentials .*set AZURE_STORAGE_CONNECTION_STRING, or"):
            size_of(as_path("az://container/x"))
    finally:
        new_clients()


def test_a_client_that_is_not_installed_is_named_with_the_command_that_brings_it(s3: S3) -> None:
    client = {"gs": "gcsfs", "az": "adlfs"}[s3.scheme]
    code = (
        f"import sys; sys.modules[{client!r}] = None\n"
        "from nfm.storage import PairStore\n"
        "from nfm.storage.errors import StorageError\n"
        f"try:\n    PairStore.open('{s3.scheme}://bucket/store')\n"
        "except StorageError as error:\n    print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"{s3.scheme}://bucket/store" in told
    assert f"pip install 'nfm-pairs[{s3.scheme}]'" in told
