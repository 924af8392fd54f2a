"""Machines that share nothing but an object store: the whole way, as results/bucket/two-machines.txt shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.clusters.apart.machines import refused

pytestmark = [pytest.mark.faults, pytest.mark.seconds(600)]
ROOT = Path(__file__).resolve().parents[3]


def test_from_images_in_a_bucket_to_samples_nothing_is_lost_when_a_machine_is(tmp_path: Path) -> None:
    if why := refused():
        pytest.skip(why)
    words = [sys.executable, "-m", "tests.clusters.apart.run", "-o", str(tmp_path / "told.txt")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *said, counts = (tmp_path / "told.txt").read_text().split("\n\n")
    assert "\nlost: 0\ntwice: 0\n" in counts
    assert "machine two is switched off" in said[0]
    assert said[0].count(" clean ") == 4
    assert "lost Ray actor 10.77.2.2/" in said[0]
