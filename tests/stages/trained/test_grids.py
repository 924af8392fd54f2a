"""Grids of samples while training: from the same noises, in the artifact, and nothing of the training changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from nfm.stages.base import Stopped
from nfm.stages.display.watching.lines import METRICS, read_lines
from nfm.stages.trained import student, teacher
from nfm.stages.trained.sampling import sample_grid
from nfm.stages.trained.student import StudentConfig
from nfm.stages.trained.teacher import TeacherConfig
from nfm.stages.trained.training import fit, train_here
from nfm.stages.trained.training.samples import DISTANCE
from nfm.storage.files import atomic
from nfm.trainers.training import parallel
from tests.clusters.distributed.processes import run
from tests.stages.trained.test_student import SIT, TINY, write_store
from tests.support.recorder import Recorder

if TYPE_CHECKING:
    from tests.conftest import Lab

STEPS = ["000000000032.png", "000000000064.png", "000000000096.png"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "nfm", "nfm", 0)


def trained(store: Path, out: Path, patience: int = 1_000_000, **options: Any) -> dict[str, bytes]:
    """The grids of a student that was trained."""
    out.mkdir(exist_ok=True)
    config = StudentConfig(**TINY | SIT | {"learning_rate": 0.1, "save_every": 16} | options)
    result = student.run(config, {"pairs": store}, out, Recorder(patience))
    drawn = {path.name: path.read_bytes() for path in sorted((out / "samples").glob("*"))}
    assert [f"samples/{name}" for name in drawn] == [name for name in result.files if name.startswith("samples/")]
    return drawn


@pytest.mark.seconds(30)
def test_grids_are_drawn_after_every_so_many_pairs_and_at_the_end_also_by_a_training_that_was_stopped(
    store: Path, tmp_path: Path
) -> None:
    whole = trained(store, tmp_path / "whole", sample_every=32)
    assert list(whole) == STEPS
    assert len(set(whole.values())) == len(STEPS)
    with pytest.raises(Stopped):
        trained(store, tmp_path / "stopped", patience=3, sample_every=32)
    assert trained(store, tmp_path / "stopped", sample_every=32) == whole
    assert list(trained(store, tmp_path / "odd", sample_every=60)) == ["000000000064.png", "000000000096.png"]


def test_the_weights_and_the_fingerprint_are_those_of_a_training_without_grids(store: Path, tmp_path: Path) -> None:
    assert trained(store, tmp_path / "without") == {}
    trained(store, tmp_path / "with", sample_every=16)
    one, other = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("without", "with"))
    assert one == other
    assert StudentConfig(sample_every=5).semantic() == StudentConfig().semantic()
    assert TeacherConfig(sample_every=5).semantic() == TeacherConfig().semantic()


def test_the_last_grid_is_the_one_that_is_drawn_of_the_finished_student(store: Path, tmp_path: Path) -> None:
    drawn = trained(store, tmp_path / "it", sample_every=96, seed=3)
    atomic.write_json(tmp_path / "it/manifest.json", {"config": {}, "metrics": {"coupling": "nfm"}})
    sample_grid(tmp_path / "it", "student", student.SHOWN, student.SHOWN_NFE, 3, tmp_path / "grid.png")
    assert drawn == {STEPS[-1]: (tmp_path / "grid.png").read_bytes()}


def one_of_two(rank: int, store: Path, out: Path, options: dict[str, Any]) -> None:
    parallel.join("cpu", rank, 2, f"file://{out}/meeting")
    config = StudentConfig(**options)
    train_here(student.task, config, {"pairs": store}, out, Recorder(), "cpu")


@pytest.mark.seconds(60)
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_of_two_processes_the_first_one_draws_what_one_alone_would(sharding: str, store: Path, tmp_path: Path) -> None:
    options = TINY | SIT | {"sample_every": 48, "sharding": sharding, "learning_rate": 0.02}
    trained(store, tmp_path / "alone", **options)
    (tmp_path / "two").mkdir()
    calls = {f"rank {rank}": (rank, store, tmp_path / "two", options) for rank in range(2)}
    run(one_of_two, tmp_path / "logs", calls)
    for name in ("000000000048.png", "000000000096.png"):
        one, other = (np.asarray(Image.open(tmp_path / way / "samples" / name), int) for way in ("alone", "two"))
        assert np.abs(one - other).max() <= 1  # their weights differ by rounding


def test_tensorboard_shows_the_grids_once_after_a_resume(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Stopped):
        trained(store, tmp_path / "it", patience=5, sample_every=32, watch=["tensorboard"])
    drawn = trained(store, tmp_path / "it", sample_every=32, watch=["tensorboard"])
    read = EventAccumulator(str(tmp_path / "it/tensorboard"), {"images": 0})
    read.Reload()
    shown = read.Images("samples")
    assert [event.step for event in shown] == [32, 64, 96]
    size = Image.open(tmp_path / "it/samples" / STEPS[0]).size
    assert {(event.width, event.height) for event in shown} == {size}
    assert len(drawn) == len(shown)


def test_a_teacher_draws_a_few_images_too(made: Lab, tmp_path: Path) -> None:
    values = {**made.only("teacher").manifest()["config"], "images": 192, "sample_every": 100}
    config = TeacherConfig(**values)
    fit(teacher.task, config, {"data": made.only("data").path}, tmp_path, Recorder())
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == ["000000000128.png", "000000000192.png"]


def test_a_distance_of_samples_is_logged_with_each_grid_and_changes_nothing_else(store: Path, tmp_path: Path) -> None:
    alone = trained(store, tmp_path / "alone", sample_every=32)
    assert trained(store, tmp_path / "with", sample_every=32, sample_distance=40) == alone
    lines = [json.loads(line) for line in (tmp_path / "with" / METRICS).read_text().splitlines()]
    told = {line["pairs_seen"]: line[DISTANCE] for line in lines if DISTANCE in line}
    assert list(told) == [32, 64, 96]
    assert all(0 < distance < 10 for distance in told.values())
    assert read_lines(tmp_path / "with" / METRICS) == [line for line in lines if DISTANCE not in line]
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("alone", "with")]
    assert weights[0] == weights[1]


def test_a_distance_without_grids_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sample_distance .* sample_every"):
        StudentConfig(**TINY | SIT | {"sample_distance": 40})
