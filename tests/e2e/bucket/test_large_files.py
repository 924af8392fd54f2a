"""Processes that write one large object at once: above 100 MiB clients upload in parts, and servers differ there."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from typing import TYPE_CHECKING, Any

import pytest

from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.files.copies import mirror
from nfm.storage.files.paths import as_path, names_in
from tests.support.buckets.s3server import CLOUD, NAMED

if TYPE_CHECKING:
    from pathlib import Path

SIZE = (101 << 20) + 1
WRITERS = 3

pytestmark = [
    pytest.mark.long,
    pytest.mark.seconds(300),
    pytest.mark.skipif(CLOUD == "s3" and NAMED not in os.environ, reason="moto looks at a condition, and writes later"),
]


def test_one_of_those_that_create_it_wins_and_its_bytes_are_whole(bucket: str) -> None:
    path = f"{bucket}/run/one"
    won = _at_once(_create, path)
    assert sorted(won) == [False] * (WRITERS - 1) + [True]
    assert atomic.hash_file(as_path(path)) == _digest(won.index(True))
    assert names_in(as_path(f"{bucket}/run")) == ["one"]


def test_one_of_those_that_replace_what_an_attempt_left_wins_and_its_bytes_are_whole(
    bucket: str, tmp_path: Path
) -> None:
    artifact = f"{bucket}/run/student/ab12"
    (as_path(artifact) / "weights").write_bytes(b"of an attempt that died")
    for number in range(WRITERS):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "weights").write_bytes(_bytes(number))
    won = _at_once(_replace, artifact, str(tmp_path))
    assert sorted(won) == [False] * (WRITERS - 1) + [True]
    assert atomic.hash_file(as_path(artifact) / "weights") == _digest(won.index(True))
    assert names_in(as_path(artifact)) == ["weights"]


def _at_once(act: Any, *where: str) -> list[bool]:
    spawned = multiprocessing.get_context("spawn")
    together, results = spawned.Barrier(WRITERS, timeout=120), spawned.SimpleQueue()
    processes = [spawned.Process(target=_told, args=(act, n, together, results, *where)) for n in range(WRITERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * WRITERS
    told = dict(results.get() for _ in processes)
    return [told[number] for number in range(WRITERS)]


def _told(act: Any, number: int, together: Any, results: Any, *where: str) -> None:
    results.put((number, act(number, together, *where)))


def _create(number: int, together: Any, path: str) -> bool:
    names_in(as_path(path).parent)  # the client is imported, and it is connected
    together.wait()
    return atomic.create_bytes(as_path(path), _bytes(number))


def _replace(number: int, together: Any, artifact: str, folder: str) -> bool:
    """All have seen the old object, and all believe that the lock is theirs."""
    try:
        mirror.push(as_path(artifact), as_path(folder) / str(number), {"weights": _digest(number)}, together.wait)
    except StorageError as error:
        if "another process writes it" in str(error):
            return False
        raise
    return True


def _bytes(number: int) -> bytes:
    return bytes([number + 1]) * SIZE


def _digest(number: int) -> tuple[str, int]:
    return hashlib.sha256(_bytes(number)).hexdigest(), SIZE
