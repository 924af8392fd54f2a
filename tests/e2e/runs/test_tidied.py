"""What only the making of data needed goes after its manifest is there: a kill between loses no work, nor leaves it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.pipeline.upkeep import gc
from nfm.stages.data import records, stage
from tests.stages.data.image_files import picture

if TYPE_CHECKING:
    from tests.conftest import Lab

KILLPOINTS = Path(__file__).parents[2] / "faults" / "killpoints"
CONFIG = '[data]\nsource = "images"\npath = "in"\nrows_per_shard = 4\nthreads = 1\n'


@pytest.fixture
def images(empty: Lab) -> Lab:
    for number in range(10):
        picture(empty.folder / "in" / f"c{number % 2}" / f"{number:02d}.png", 10 * number)
    (empty.folder / "images.toml").write_text(CONFIG)
    return empty


def killed(lab: Lab, point: str) -> Path:
    """A run of the data stage that is killed there; gives its artifact."""
    environment = {"PYTHONPATH": str(KILLPOINTS), "NFM_TEST_KILL": f"{point}:1:{lab.folder / 'token'}"}
    process = lab.start("run", "data", "-c", "images.toml", **environment)
    process.communicate()
    assert process.returncode == -9
    (artifact,) = lab.artifacts.glob("data/*")
    return artifact


@pytest.mark.seconds(120)
def test_a_run_that_is_killed_before_its_manifest_decodes_nothing_anew(images: Lab) -> None:
    artifact = killed(images, "before-manifest")
    assert not (artifact / "manifest.json").exists()
    made = {path: path.stat().st_mtime_ns for path in (artifact / records.FOLDER).iterdir()}
    assert len(made) >= 3
    told = images.nfm("run", "data", "-c", "images.toml").stderr
    assert f"{len(made)} of {len(made)} parts are decoded already" in told
    assert not any((artifact / name).exists() for name in stage.WORKING)
    images.nfm("audit", "-c", "images.toml")


@pytest.mark.seconds(120)
def test_what_a_run_that_is_killed_after_its_manifest_left_is_removed_by_gc(
    images: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "IDLE_SECONDS", -3600.0)
    artifact = killed(images, "after-manifest")
    assert (artifact / records.FOLDER).is_dir()
    assert "is up to date" in images.nfm("run", "data", "-c", "images.toml").stderr
    assert "removed 2 parts: " in images.nfm("gc", "-c", "images.toml", "--yes").stdout
    assert not any(os.path.isdir(artifact / name) and os.listdir(artifact / name) for name in stage.WORKING)
    images.nfm("audit", "-c", "images.toml")
