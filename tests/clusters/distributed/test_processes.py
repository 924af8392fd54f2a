"""The error messages of the test processes when one of them fails: the cause comes first."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.clusters.distributed import processes


def cause_or_victim(role: str, folder: Path) -> None:
    """The victim fails once the cause has ended."""
    if role == "victim":
        while not (folder / "failed").exists():
            time.sleep(0.01)
        time.sleep(0.1)  # longer than a tick of the clock that dates files: who is silent first is told by their dates
        raise ConnectionError("closed by peer")
    print("no such store", file=sys.stderr, flush=True)
    (folder / "failed").touch()
    sys.exit(3)


def test_who_failed_first_is_shown_first_with_every_exit_code(tmp_path: Path) -> None:
    calls = {role: (role, tmp_path) for role in ("victim", "cause")}
    with pytest.raises(pytest.fail.Exception) as caught:
        processes.run(cause_or_victim, tmp_path, calls)
    told = str(caught.value)
    assert told.startswith("cause: exit code 3\nno such store\n")
    assert "victim: exit code 1\n" in told
    assert told.endswith("ConnectionError: closed by peer")


def test_a_process_that_does_not_end_is_named_and_stopped(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="sleeper: stopped by the test: it had not ended"):
        processes.run(time.sleep, tmp_path, {"sleeper": (3600,)}, patience=0)
