"""The lock: one holder at a time, whose name others see. A dead or silent holder is replaced by exactly one process."""

from __future__ import annotations

import json
import multiprocessing
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
from tests.support.patience import PATIENCE, allowed, until


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


def test_a_lock_names_its_holder_beats_and_goes_away(tmp_path: Path, fast_heart: None) -> None:
    with Lock(tmp_path) as held:
        first = body_of(tmp_path)
        assert first["pid"] == os.getpid()
        until(lambda: body_of(tmp_path)["beat"] > first["beat"])
        assert not held.lost
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused_at_once_with_the_name_of_the_holder(tmp_path: Path) -> None:
    with Lock(tmp_path):
        started = time.monotonic()
        with pytest.raises(Held, match=rf"process {os.getpid()}, .*wait for it or stop it"), Lock(tmp_path):
            pass
        assert time.monotonic() - started < allowed(2)
        assert body_of(tmp_path)["pid"] == os.getpid()
    with Lock(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_taken_at_once(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from nfm.pipeline.artifacts.lock import Lock\n"
    code += "with Lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(Held, match=f"process {process.pid}"), Lock(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie until communicate() below
    started = time.monotonic()
    with Lock(tmp_path):
        assert body_of(tmp_path)["pid"] == os.getpid()
    assert time.monotonic() - started < allowed(5)
    process.communicate()


def test_a_process_number_that_was_given_again_is_not_the_holder(tmp_path: Path) -> None:
    with Lock(tmp_path):
        body = body_of(tmp_path)
    foreign(tmp_path, space=body["space"], pid=os.getpid(), born="1")
    with Lock(tmp_path):
        assert body_of(tmp_path)["born"] == body["born"]


def test_the_silent_lock_of_another_machine_is_taken_after_the_stated_time(tmp_path: Path) -> None:
    foreign(tmp_path)
    started = time.monotonic()
    with Lock(tmp_path, stale_seconds=0.5):
        assert time.monotonic() - started >= 0.5
        assert body_of(tmp_path)["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_another_machine_that_beats_is_left_alone(tmp_path: Path) -> None:
    stop = threading.Event()

    def beat() -> None:
        count = 4
        while not stop.wait(0.05):
            count += 1
            foreign(tmp_path, beat=count)

    foreign(tmp_path)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(Held, match="'nfm run teacher' on elsewhere"), Lock(tmp_path, stale_seconds=PATIENCE):
            pass
    finally:
        stop.set()
        thread.join()
    assert body_of(tmp_path)["host"] == "elsewhere"


def take(folder: str, start: Any, answered: Any, results: Any) -> None:
    start.wait()
    try:
        with Lock(Path(folder), stale_seconds=0.3):
            results.put("held")
            answered.wait(PATIENCE)
    except Held:
        results.put("refused")


def test_of_many_takers_of_a_stale_lock_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    foreign(tmp_path)
    start, answered, results = context.Barrier(4), context.Event(), context.Queue()
    takers = [context.Process(target=take, args=(str(tmp_path), start, answered, results)) for _ in range(4)]
    for taker in takers:
        taker.start()
    outcomes = [results.get(timeout=PATIENCE) for _ in takers]
    answered.set()
    for taker in takers:
        taker.join()
    assert sorted(outcomes) == ["held", "refused", "refused", "refused"]
    assert list(tmp_path.iterdir()) == []


def test_the_marker_of_a_taker_that_died_does_not_stay_in_the_way(tmp_path: Path) -> None:
    body = foreign(tmp_path)
    marker = tmp_path / f"lock.{body['id']}.taken"
    marker.write_text("a taker that died")
    os.utime(marker, (time.time() - 60, time.time() - 60))
    with Lock(tmp_path, stale_seconds=0.2):
        assert body_of(tmp_path)["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_holder_notices_that_its_lock_was_taken(tmp_path: Path, fast_heart: None) -> None:
    with Lock(tmp_path) as held:
        foreign(tmp_path)
        until(lambda: held.lost)
    assert body_of(tmp_path)["host"] == "elsewhere"  # the new holder's lock stays


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
