"""The first seconds of a run check everything that it will need: clusters, devices, disk space, code."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Lab

NEEDS = {
    "a Ray cluster": (("pairs.executor=ray", "pairs.ray_address=127.0.0.1:1"), 1, "no Ray cluster answers"),
    "a port that is none": (("pairs.executor=ray", "pairs.ray_address=127.0.0.1:99999"), 1, "no Ray cluster answers"),
    "a device of the teacher": (("teacher.device=cuda:99",), 2, "device = 'cuda:99'"),
    "a device of the student": (("student.device=cpu:7",), 2, "device = 'cpu:7'"),
    "a device that is none": (("pairs.device=gpu",), 2, "auto, cpu, cuda and cuda:0"),
    "a custom function": (("pairs.coupling=custom", "pairs.custom=none:f"), 2, "there is no module none"),
    "a custom function of its module": (
        ("pairs.coupling=custom", "pairs.custom=json:f"),
        2,
        "has no function 'f'",
    ),
    "a custom function's name": (("pairs.coupling=custom",), 2, "pairs.custom = None"),
}


@pytest.mark.parametrize("what", NEEDS)
def test_what_is_missing_is_told_before_anything_is_made(empty: Lab, what: str) -> None:
    sets, exits, says = NEEDS[what]
    told = empty.run("student", *sets, exits=exits).stderr
    assert says in told
    assert len(told.splitlines()) == 1
    assert not list(empty.artifacts.glob("[a-z]*"))


def test_a_stage_runs_without_what_it_does_not_need(empty: Lab) -> None:
    empty.run("data", "teacher.device=cuda:99", "pairs.executor=ray", "pairs.ray_address=127.0.0.1:1")


def test_a_store_that_does_not_fit_on_the_disk_is_refused_before_its_teacher_is_trained(
    empty: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty.run("data")
    usage = shutil.disk_usage(empty.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    told = empty.run("pairs", "pairs.draws=9", exits=1).stderr.splitlines()[-1]
    assert "pairs: writes about" in told
    assert "has 100,000 free: free space" in told
    assert [path.name for path in empty.artifacts.glob("[a-z]*")] == ["data"]
    empty.nfm("plan", "pairs", "-c", "tiny.toml", "--set", "pairs.draws=9", "--rate", "1")  # to look costs nothing


def test_the_folder_of_rays_logs_is_the_one_that_ray_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._common.utils import get_default_ray_temp_dir
    from ray._private import worker

    from nfm.stages.executors import ray_messages

    monkeypatch.setattr(worker, "_global_node", None)  # that of another test's Ray, whose folder is another
    for variables in ({"RAY_TMPDIR": "/scratch/of-mine"}, {"TMPDIR": "/scratch/all"}, {}):
        for name in ("RAY_TMPDIR", "TMPDIR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert ray_messages.logs() == f"{get_default_ray_temp_dir()}/session_latest/logs"
