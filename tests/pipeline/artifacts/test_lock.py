"""The lock: one holder at a time, whose name others see. A dead or silent holder is replaced by exactly one process.

The same promises hold in a folder and in a bucket.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nfm.pipeline.artifacts import lock
from nfm.pipeline.artifacts.lock import Held, Lock
from nfm.storage.files import atomic
from nfm.storage.files.paths import as_path, is_remote, names_in
from tests.support.buckets.s3server import S3
from tests.support.forkserver import context
from tests.support.patience import PATIENCE, allowed, until


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of an artifact, here or on an object store."""
    if request.param == "folder":
        return tmp_path
    return as_path(f"{request.getfixturevalue('bucket')}/run/teacher/0123456789ab")


def is_free(place: Path) -> bool:
    """Whether nobody holds the lock, and nothing is left of those who did; in a bucket a lock that says so."""
    if not is_remote(place):
        return names_in(place) == []
    return names_in(place) == ["lock.json"] and body_of(place)["free"] is True


@pytest.fixture
def fast_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)


def body_of(folder: Path) -> dict[str, Any]:
    return atomic.read_json(folder / "lock.json")


def foreign(folder: Path, **changes: Any) -> dict[str, Any]:
    """A lock that a process on another machine left."""
    body = {"id": "f" * 32, "host": "elsewhere", "pid": 17, "space": "another machine", "born": "1",
            "command": "nfm run teacher", "since": "2026-03-09 12:00:00+0000", "beat": 4, **changes}  # fmt: skip
    atomic.write_json(folder / "lock.json", body)
    return body


def test_a_lock_names_its_holder_beats_and_goes_away(place: Path, fast_heart: None) -> None:
    with Lock(place) as held:
        first = body_of(place)
        assert first["pid"] == os.getpid()
        until(lambda: body_of(place)["beat"] > first["beat"])
        assert not held.lost
    assert is_free(place)


def test_a_second_process_is_refused_at_once_with_the_name_of_the_holder(place: Path) -> None:
    with Lock(place):
        started = time.monotonic()
        with pytest.raises(Held, match=rf"process {os.getpid()}, .*wait for it or stop it"), Lock(place):
            pass
        assert time.monotonic() - started < allowed(2)
        assert body_of(place)["pid"] == os.getpid()
    with Lock(place):
        pass


def test_the_lock_of_a_killed_process_is_taken_at_once(place: Path) -> None:
    code = "import sys, time; from nfm.pipeline.artifacts.lock import Lock\n"
    code += "from nfm.storage.files.paths import as_path\n"
    code += "with Lock(as_path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(place)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(Held, match=f"process {process.pid}"), Lock(place):
        pass
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie until communicate() below
    started = time.monotonic()
    with Lock(place):
        assert body_of(place)["pid"] == os.getpid()
    assert time.monotonic() - started < allowed(5)
    process.communicate()


def test_a_process_number_that_was_given_again_is_not_the_holder(place: Path) -> None:
    with Lock(place):
        body = body_of(place)
    foreign(place, space=body["space"], pid=os.getpid(), born="1")
    with Lock(place):
        assert body_of(place)["born"] == body["born"]


def test_the_silent_lock_of_another_machine_is_taken_after_the_stated_time(place: Path) -> None:
    foreign(place)
    started = time.monotonic()
    with Lock(place, stale_seconds=0.5):
        assert time.monotonic() - started >= 0.5
        assert body_of(place)["pid"] == os.getpid()
    assert is_free(place)


def test_the_lock_of_another_machine_that_beats_is_left_alone(place: Path) -> None:
    stop = threading.Event()

    def beat() -> None:
        count = 4
        while not stop.wait(0.05):
            count += 1
            foreign(place, beat=count)

    foreign(place)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(Held, match="'nfm run teacher' on elsewhere"), Lock(place, stale_seconds=PATIENCE):
            pass
    finally:
        stop.set()
        thread.join()
    assert body_of(place)["host"] == "elsewhere"


def take(folder: str, environment: dict[str, str], start: Any, answered: Any, results: Any) -> None:
    os.environ.update(environment)  # of a bucket
    start.wait(PATIENCE)
    try:
        with Lock(as_path(folder), stale_seconds=0.3):
            results.put("held")
            answered.wait(PATIENCE)
    except Held:
        results.put("refused")


def test_of_many_takers_of_a_stale_lock_one_wins(place: Path) -> None:
    foreign(place)
    start, answered, results = context.Barrier(4), context.Event(), context.Queue()
    shared = (str(place), dict(os.environ), start, answered, results)
    takers = [context.Process(target=take, args=shared) for _ in range(4)]
    for taker in takers:
        taker.start()
    outcomes = [results.get(timeout=PATIENCE) for _ in takers]
    answered.set()
    for taker in takers:
        taker.join()
    assert sorted(outcomes) == ["held", "refused", "refused", "refused"]
    assert is_free(place)


def test_the_marker_of_a_taker_that_died_does_not_stay_in_the_way(tmp_path: Path) -> None:
    body = foreign(tmp_path)
    marker = tmp_path / f"lock.{body['id']}.taken"
    marker.write_text("a taker that died")
    os.utime(marker, (time.time() - 60, time.time() - 60))
    with Lock(tmp_path, stale_seconds=0.2):
        assert body_of(tmp_path)["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_holder_notices_that_its_lock_was_taken(place: Path, fast_heart: None) -> None:
    with Lock(place) as held:
        foreign(place)
        until(lambda: held.lost)
    assert body_of(place)["host"] == "elsewhere"  # the new holder's lock stays


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_heartbeat_continues_after_a_full_disk(tiny_disk: Path, fast_heart: None) -> None:
    with Lock(tiny_disk) as held:
        filler = tiny_disk / "filler"
        with pytest.raises(OSError):
            filler.write_bytes(bytes(100_000))
        time.sleep(0.3)
        during = json.loads((tiny_disk / "lock.json").read_text())["beat"]
        filler.unlink()
        until(lambda: body_of(tiny_disk)["beat"] > during)
        assert not held.lost


@pytest.mark.parametrize("kind", ["lose", "reset", "error"])
def test_lost_answers_of_a_bucket_neither_lose_the_lock_nor_give_it_twice(
    kind: Any, s3: S3, bucket: str, fast_heart: None
) -> None:
    place = as_path(f"{bucket}/run/teacher/0123456789ab")
    s3.fail(kind, "lock.json", method="PUT")
    with Lock(place) as held:
        s3.fail(kind, "lock.json", method="PUT", times=2)
        first = body_of(place)["beat"]
        until(lambda: body_of(place)["beat"] > first + 2)
        assert not held.lost
        with pytest.raises(Held), Lock(place):
            pass
        s3.fail(kind, "lock.json", method="PUT")
    assert is_free(place)


def test_a_heartbeat_whose_fate_is_unknown_is_continued(
    s3: S3, bucket: str, fast_heart: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = as_path(f"{bucket}/run/teacher/0123456789ab")
    with Lock(place) as held:
        monkeypatch.setenv("NFM_PATIENCE", "0")
        lost = s3.fail("lose", "lock.json", method="PUT", times=2)  # it is written, and nobody learns that
        unread = s3.fail("reset", "lock.json", method="GET", times=2)
        until(lambda: not lost.times and not unread.times)
        monkeypatch.setenv("NFM_PATIENCE", "10")
        first = body_of(place)["beat"]
        until(lambda: body_of(place)["beat"] > first)
        assert not held.lost


def test_a_holder_that_comes_back_after_its_lease_writes_nothing_and_says_who_goes_on(place: Path) -> None:
    gone = Lock(place, stale_seconds=0.3)
    gone._body |= {"space": "another machine", "host": "elsewhere"}  # suspended: its heart does not beat
    assert gone.place.create(gone._body)
    with Lock(place, stale_seconds=0.3) as held:
        assert not gone.place.beat(gone._body)
        gone.place.release(gone._body)
        assert body_of(place)["id"] == held._body["id"]
        with pytest.raises(Held, match=rf"process {os.getpid()}\) took this work over"):
            gone.check()
    assert is_free(place)


def test_only_who_looks_sees_a_holder_on_another_machine_alive(place: Path) -> None:
    assert not Lock(place).lives()
    foreign(place)
    assert Lock(place).lives()
    with Lock(place, stale_seconds=0.2):
        assert Lock(place).lives()
    assert not Lock(place).lives()
