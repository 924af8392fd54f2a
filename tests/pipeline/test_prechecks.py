"""The plan and the first seconds of a run report sections that do not fit each other or the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.conftest import Lab

SIZES = {
    "teacher.patch=3": ("config section [teacher]", "patch = 3 does not divide the image 8 x 8"),
    "teacher.channels=33": ("config section [teacher]", "channels = 33 is not a multiple of head_size = 32"),
    "student.head_size=48": ("config section [student]", "head_size = 48"),
    "student.patch=5": ("config section [student]", "patch = 5 does not divide"),
    "data.average=2": ("config section [features]", "sides of 8 pixels or more"),
}


@pytest.mark.parametrize("override", SIZES)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_sizes_that_do_not_fit_are_reported_before_anything_is_made(empty: Lab, command: str, override: str) -> None:
    told = empty.nfm(command, "evaluate", "-c", "tiny.toml", "--set", override, exits=2).stderr
    for part in SIZES[override]:
        assert part in told
    assert not list(empty.artifacts.glob("[a-z]*"))


def test_what_a_stage_does_not_need_may_have_any_size(empty: Lab) -> None:
    empty.nfm("plan", "features", "-c", "tiny.toml", "--set", "teacher.patch=3", "--set", "student.head_size=48")


def test_sizes_that_only_the_data_determines_are_checked_once_it_exists(empty: Lab) -> None:
    np.savez(empty.folder / "some.npz", data=np.zeros((40, 1, 6, 6), np.uint8))
    text = empty.config.read_text(encoding="utf-8").replace('source = "digits"', 'source = "npz"\npath = "some.npz"')
    empty.config.write_text(text, encoding="utf-8")
    sets = ("teacher.patch=4", "teacher.batch_size=8")
    assert "patch = 4 does not divide the image 6 x 6" in empty.run("teacher", *sets, exits=2).stderr
    assert [path.name for path in sorted(empty.artifacts.glob("[a-z]*"))] == ["data"], "nothing else was begun"
    told = empty.nfm("plan", "teacher", "-c", "tiny.toml", "--set", "teacher.batch_size=64", exits=2).stderr
    assert "batch_size 64 exceeds the 32 records there are: lower it\n" in told, "no argument of the library's callers"
    odd = ("teacher.batch_size=8", "pairs.layout=zarr", "pairs.rows_per_block=24")
    told = empty.nfm("plan", *empty.arguments("pairs", *odd)[1:], exits=2).stderr
    assert "config section [pairs]" in told


def test_a_stage_that_is_measured_on_heldout_images_is_not_begun_without_any(empty: Lab) -> None:
    for stage in ("teacher", "features"):
        told = empty.run(stage, "data.heldout=0", exits=2).stderr
        assert f"{stage}: is measured on held-out images, and the data have none: set data.heldout above 0" in told
        assert not (empty.artifacts / stage).exists()


def test_wrong_use_that_a_stage_finds_itself_leaves_no_artifact_behind(empty: Lab) -> None:
    told = empty.run("data", "data.classes=[]", exits=2).stderr
    assert "data.classes = [] names no class" in told
    assert not list(empty.artifacts.glob("data/*"))
