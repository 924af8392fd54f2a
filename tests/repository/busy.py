"""Runs the tests that start processes many times on a busy machine.

    python tests/repository/busy.py [--times 20] [-o FILE]

Loops that only use the processor run beside the tests, and end when this command ends. After every round FILE
holds what was found so far: passed, failed, seconds, the names of failures, and the machine. Exit 1 when a test failed,
or a round did not end in time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from nfm.stages.trained.devices.machine import machine
from nfm.storage.files import atomic

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "tests/clusters/distributed",
    "tests/clusters/ray",
    "tests/stages/executors/test_ray.py",
    "tests/e2e/runs/test_interrupted.py",
    "tests/storage/files/test_cache.py",
)
# A loop looks whether its parent is still there: nobody can tell it when that was killed.
LOOP = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(1_000_000): pass"


@contextmanager
def loops(count: int) -> Iterator[None]:
    """So many processes that compute for nothing."""
    running = [subprocess.Popen([sys.executable, "-S", "-c", LOOP, str(os.getpid())]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def run_once(command: list[str], minutes: float) -> dict[str, Any]:
    """One round: its tests, its seconds, and of what failed the names and the last lines of what pytest said."""
    with tempfile.TemporaryDirectory() as folder:
        report, begun = Path(folder) / "report.xml", time.monotonic()
        with open(Path(folder) / "said", "w+", encoding="utf-8") as said:
            process = subprocess.Popen(
                [*command, f"--junitxml={report}"], cwd=ROOT, stdout=said, stderr=said, start_new_session=True
            )
            try:
                code: int | None = process.wait(minutes * 60)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            found = counted(report) | {"seconds": round(time.monotonic() - begun, 1), "exit_code": code}
            if code != 0:
                said.seek(0)
                found["said"] = said.read().splitlines()[-200:]
    return found


def counted(report: Path) -> dict[str, Any]:
    """What pytest wrote down; nothing when it was stopped before."""
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(bad) - len(skipped),
        "failed": len(bad),
        "skipped": len(skipped),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in bad],
    }


@click.command()
@click.argument("tests", nargs=-1)
@click.option("--times", default=20, show_default=True, type=click.IntRange(1, 1000), help="Rounds.")
@click.option("--each", default=1, show_default=True, type=click.IntRange(1, 100), help="Times of a test in a round.")
@click.option("--loops", "count", default=2, show_default=True, type=click.IntRange(0, 64), help="Busy processes.")
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(0, 64), help="As of `make test`.")
@click.option("--minutes", default=30.0, show_default=True, help="After which a round is stopped.")
@click.option("--hours", default=6.0, show_default=True, help="After which no other round begins.")
@click.option("-o", "--output", default="results/busy/busy.json", show_default=True, type=click.Path(path_type=Path))
def main(
    tests: tuple[str, ...], times: int, each: int, count: int, jobs: int, minutes: float, hours: float, output: Path
) -> None:
    """TESTS: paths and other arguments for pytest, the tests that start processes by default."""
    tests = tests or TESTS
    command = [sys.executable, "-m", "pytest", "-n", str(jobs), f"--count={each}", *tests]
    rounds: list[dict[str, Any]] = []
    begun = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    with loops(count):
        while len(rounds) < times and time.monotonic() - begun < hours * 3600:
            rounds.append(run_once(command, minutes))
            good = sum(one["exit_code"] == 0 for one in rounds)
            body = {
                "tests": list(tests), "jobs": jobs, "busy_loops": count, "times": times, "each": each,
                "rounds_done": len(rounds), "rounds_passed": good, "machine": machine(), "rounds": rounds,
            }  # fmt: skip
            atomic.write_json(output, body)
            last = rounds[-1]
            ended = "" if last["exit_code"] is not None else f", stopped after {minutes:g} minutes"
            counts = f"{last['passed']} passed, {last['failed']} failed in {last['seconds']} s"
            click.echo("\n  ".join([f"round {len(rounds)}: {counts}{ended}", *last["failures"]]))
    if good < times:
        sys.exit(1)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))
    main()
