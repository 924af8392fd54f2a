"""The first seconds of a run check everything that it will need: clusters, devices, disk space, code."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from nfm.pipeline.config import RunConfig

if TYPE_CHECKING:
    from tests.conftest import Lab

NEEDS = {
    "a Ray cluster": (("pairs.executor=ray", "pairs.ray_address=127.0.0.1:1"), 1, "no Ray cluster answers"),
    "a device of the teacher": (("teacher.device=cuda:99",), 2, "device = 'cuda:99'"),
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


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("pairs.executor=slrum", "'ray', 'serial' or 'slurm'"),
        ("pairs.ray_address=127.0.0.1:99999", "write HOST:PORT with a port from 1 to 65535"),
        ("teacher.ray_address=http://head:8265", "no address of a Ray cluster"),
        ("data.ray_address=head", "no address of a Ray cluster"),
        ("student.device=cpu:7", "is none of auto, cpu, cuda and cuda:0"),
        ("evaluate.device=gpu", "is none of auto, cpu, cuda and cuda:0"),
        ('student.watch=["wandb", "wandb"]', "named more than once"),
    ],
)
def test_a_setting_that_is_right_nowhere_is_refused_though_nothing_is_made_with_it(
    empty: Lab, wrong: str, says: str
) -> None:
    told = empty.run("data", wrong, exits=2).stderr
    assert says in told
    assert f"--set {wrong}" in told
    assert len(told.splitlines()) == 1


def test_every_field_for_a_device_or_a_cluster_refuses_what_is_none() -> None:
    """With nothing to be made: the config is refused as such."""
    seen = 0
    for name, field in RunConfig.model_fields.items():
        for key in {"device", "ray_address"} & getattr(field.annotation, "model_fields", {}).keys():
            seen += 1
            with pytest.raises(ValidationError, match=r"is none of auto|no address of a Ray"):
                RunConfig.model_validate({"data": {"source": "digits"}, name: {key: "none at all"}})
    assert seen >= 10


def test_an_address_of_the_environment_is_told_as_that(empty: Lab) -> None:
    told = empty.run("student", "pairs.executor=ray", exits=2, RAY_ADDRESS="head").stderr
    assert "RAY_ADDRESS = 'head': no address of a Ray cluster" in told


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
