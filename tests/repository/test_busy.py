"""Tests on a busy machine: every round is counted, and the load ends with the command, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from click.testing import CliRunner

from tests.repository.busy import LOOP, counted, main

PLAIN = ("-p", "no:cacheprovider", "-c", os.devnull, "--noconftest")


def state(pid: int) -> str:
    """What the kernel says of a process; "" when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_every_round_is_counted_with_the_names_of_failures(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("def test_good():\n    pass\n\n\ndef test_bad():\n    assert 1 == 2\n")
    options = ["--times", "1", "--loops", "1", "--jobs", "0", "-o", str(tmp_path / "busy.json")]
    done = CliRunner().invoke(main, [*options, "--", *PLAIN, str(tmp_path / "test_some.py")])
    assert done.exit_code == 1, done.output
    assert "1 passed, 1 failed" in done.output
    found = json.loads((tmp_path / "busy.json").read_text())
    (only,) = found["rounds"]
    assert (only["passed"], only["failed"], only["exit_code"]) == (1, 1, 1)
    assert [name.rpartition("::")[2] for name in only["failures"]] == ["test_bad"]
    assert any("assert 1 == 2" in line for line in only["said"])
    assert (found["rounds_done"], found["rounds_passed"]) == (1, 0)
    assert found["machine"]["cores"] >= 1


def test_a_round_that_was_stopped_has_no_tests(tmp_path: Path) -> None:
    assert counted(tmp_path / "report.xml") == {"passed": 0, "failed": 0, "skipped": 0, "failures": []}


def test_a_loop_ends_when_its_parent_was_killed() -> None:
    code = "import os, subprocess, sys\n"
    code += f"print(subprocess.Popen([sys.executable, '-S', '-c', {LOOP!r}, str(os.getpid())]).pid, flush=True)\n"
    code += "sys.stdin.read()"
    parent = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    loop = int(parent.stdout.readline())
    assert state(loop)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    while state(loop) not in ("", "Z"):  # a zombie goes when init looks
        time.sleep(0.01)
