"""Conditional puts: what one process wrote no other overwrites unseen; a server without them is refused by name."""

from __future__ import annotations

import os
from typing import Any

import pytest

from nfm.pipeline.artifacts import conditional
from nfm.pipeline.artifacts.conditional import NoConditions
from nfm.pipeline.artifacts.lock import Lock
from nfm.storage.errors import NoPlace
from nfm.storage.files.paths import as_path, names_in
from tests.support.buckets import emulators
from tests.support.buckets.s3server import NAMED, S3, new_clients, s3_alone


@pytest.fixture(autouse=True)
def _asked_anew() -> None:
    conditional.check.cache_clear()


@pytest.mark.parametrize("s3", ["s3", "gs", "az"], indirect=True)
def test_an_object_is_created_once_and_replaced_only_by_who_saw_its_last_version(s3: S3, bucket: str) -> None:
    path = as_path(f"{bucket}/one")
    assert conditional.read(path) is None
    assert conditional.replace(path, b"nothing there", '"1"' if s3.scheme != "gs" else "1") is None
    first = conditional.create(path, b"first")
    assert first is not None
    assert conditional.create(path, b"other") is None
    second = conditional.replace(path, b"second", first)
    assert second is not None
    assert conditional.replace(path, b"third", first) is None
    stored = conditional.read(path)
    assert stored is not None
    assert (stored.data, stored.tag) == (b"second", second)
    assert 0 <= stored.age < 3600
    conditional.check(f"{bucket}/run")
    assert names_in(as_path(bucket)) == ["one"]


@s3_alone
def test_a_server_that_knows_a_tag_only_without_its_quotation_marks_keeps_to_it(s3: S3, bucket: str) -> None:
    path = as_path(f"{bucket}/one")
    first = conditional.create(path, b"first")
    assert first is not None
    s3.fail("error", "one", method="PUT", status=412, code="PreconditionFailed")  # what Ceph's says to the usual form
    second = conditional.replace(path, b"second", first)
    assert second is not None
    asked = s3.count("PUT", "one")
    third = conditional.replace(path, b"third", second)
    assert third is not None
    assert s3.count("PUT", "one") == asked + 1, "it was asked in that form at once"
    assert conditional.replace(path, b"fourth", second) is None


@pytest.mark.parametrize("kind", ["lose", "reset", "error"])
def test_a_put_whose_answer_was_lost_is_known_to_be_our_own(kind: Any, s3: S3, bucket: str) -> None:
    path = as_path(f"{bucket}/one")
    s3.fail(kind, "one", method="PUT", times=2)
    first = conditional.create(path, b"first")
    assert first is not None
    s3.fail(kind, "one", method="PUT", times=2)
    assert conditional.replace(path, b"second", first) is not None
    s3.fail("error", "one", method="PUT", status=409, code="ConditionalRequestConflict")
    assert conditional.create(path, b"third") is None


@s3_alone
@pytest.mark.skipif(NAMED in os.environ, reason="headers that the proxy leaves out are signed, and moto does not check")
@pytest.mark.parametrize("header", ["if-match", "if-none-match"])
def test_a_server_that_ignores_conditions_is_refused_by_name_and_nothing_is_left(
    header: Any, s3: S3, bucket: str
) -> None:
    s3.fail(header, times=100)
    with pytest.raises(NoConditions, match=rf"(?i){bucket}/run: this object store has no conditional writes.*{header}"):
        Lock(as_path(f"{bucket}/run/teacher/0123456789ab")).__enter__()
    assert names_in(as_path(bucket)) == []


def test_an_emulator_of_googles_that_ignores_conditions_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = pytest.importorskip("gcp_storage_emulator.server").create_server(
        "127.0.0.1", 0, in_memory=True, default_bucket="ignores"
    )
    server.start()
    try:
        new_clients()
        port = server._api._httpd.server_address[1]
        for name, value in emulators.environment("gs", f"http://127.0.0.1:{port}").items():
            monkeypatch.setenv(name, value)
        with pytest.raises(NoConditions, match=r"gs://ignores/run: .*overwrites an object .* ifGenerationMatch=0 must"):
            Lock(as_path("gs://ignores/run/teacher/0123456789ab")).__enter__()
        assert names_in(as_path("gs://ignores")) == []
    finally:
        server.stop()
        new_clients()


@pytest.mark.parametrize("status", [400, 501])
def test_a_server_that_refuses_conditions_is_refused_by_name(status: int, s3: S3, bucket: str) -> None:
    s3.fail("error", ".conditions-", method="PUT", status=status, code="NotImplemented", times=100)
    with pytest.raises(NoConditions, match=r"it refuses puts with .*atch"):
        Lock(as_path(f"{bucket}/run/teacher/0123456789ab")).__enter__()


def test_a_place_where_no_lock_can_be_kept_is_refused() -> None:
    with pytest.raises(NoPlace, match="memory://x/store: no lock can be kept there"):
        Lock(as_path("memory://x/store"))


def test_a_server_is_asked_once_in_a_process(s3: S3, bucket: str) -> None:
    for name in ("0123456789ab", "ba9876543210"):
        with Lock(as_path(f"{bucket}/run/teacher/{name}")):
            pass
    assert s3.count("PUT", ".conditions-") <= 5, "four, and one more where tags have no quotation marks"
