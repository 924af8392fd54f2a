"""The tests of models and mathematics on this device, in a process of their own and without the tests' own setup."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.accelerator.job import Job

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "tests/trainers/test_on_devices.py",
    "tests/trainers/couplings/test_semidiscrete.py::test_a_fit_goes_on_from_its_state_on_a_cuda_device",
)
ALONE = {"PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins import what they belong to
SHOWN = 20


def tests(job: Job) -> dict[str, Any]:
    """How many passed, were skipped and failed; the names of what failed."""
    if importlib.util.find_spec("pytest") is None:
        return {"not_measured": "pytest is not installed"}
    files = FILES[:1] if job.plan.name == "tiny" else FILES
    with tempfile.TemporaryDirectory(prefix="nfm-tests-") as folder:
        report = Path(folder) / "report.xml"
        # The configuration of all tests imports packages that are no part of this.
        command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", f"--junitxml={report}",
                   *files]  # fmt: skip
        left = max(1.0, job.until - time.monotonic())
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | ALONE, capture_output=True, text=True,
            encoding="utf-8", errors="backslashreplace", timeout=left, check=False,
        )  # fmt: skip
        if not report.exists():
            raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case.get("name") for case in cases if {part.tag for part in case} & {"failure", "error"}]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failed) - skipped
    if failed or not passed:
        raise RuntimeError(f"{len(failed)} of {len(cases)} tests failed: {', '.join(map(str, failed[:SHOWN]))}")
    return {"passed": passed, "skipped": skipped}
