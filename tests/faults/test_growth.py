"""Draws that are added later do not change the existing ones or disturb readers of the older generation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faults.harness import Making, check_whole
from tests.support.patience import PATIENCE

if TYPE_CHECKING:
    from tests.conftest import Lab
    from tests.faults.conftest import Uninterrupted

READER = Path(__file__).with_name("reader.py")
SOME = [
    "serial",
    pytest.param("ray", marks=pytest.mark.faults),
    pytest.param("slurm", marks=pytest.mark.faults),
]


def reader(store: Path, folder: Path, *pause: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, READER, store, folder, *pause], stdout=subprocess.PIPE, text=True)


def files_of(store: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and modification time of all that is sealed."""
    kept = ("manifest*.json", "spec.json", "shards/*", "index/*", "commits/*")
    paths = [path for pattern in kept for path in store.glob(pattern)]
    return {str(path.relative_to(store)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize("executor", SOME, indirect=True)
def test_draws_added_later_leave_files_and_readers_of_the_first_generation_alone(
    bare: Lab, tmp_path: Path, executor: str, uninterrupted: Uninterrupted
) -> None:
    making = Making(bare, executor)
    making.by("serial", draws=2).seal()
    before = files_of(making.store)
    assert len(before) == 2 + 3 * 64
    alone, _ = reader(making.store, tmp_path).communicate(timeout=PATIENCE)
    disturbed = reader(making.store, tmp_path, "pause")
    try:
        bare.until((tmp_path / "paused").exists, disturbed)
        making.seal() if executor == "serial" else making.resume()
        (tmp_path / "go").touch()
        sequence, _ = disturbed.communicate(timeout=PATIENCE)
    finally:
        disturbed.kill()
    after = files_of(making.store)
    assert before.items() <= after.items()
    assert len(after) == 3 + 3 * 128
    assert sequence == alone
    assert len(alone.split()) == 4 * 256 // 32
    check_whole(making, uninterrupted(4))
