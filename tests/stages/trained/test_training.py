"""What the trained stages keep: weights that load again, metrics, facts measured with the averaged weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from nfm.stages.base import StageError, Stopped
from nfm.stages.trained import features, student, teacher
from nfm.stages.trained.devices import machine
from nfm.stages.trained.teacher import TeacherConfig
from nfm.stages.trained.training import over_all
from nfm.stages.trained.training.section import recipe
from nfm.storage import ImageDataset
from tests.support.recorder import Recorder

if TYPE_CHECKING:
    from tests.conftest import Lab


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_metrics_have_a_line_an_interval_with_loss_rate_and_share_of_waiting(made: Lab) -> None:
    for stage, unit, every, examples in (("teacher", "images", 1000, 3008), ("student", "pairs", 1000, 2048)):
        found = lines(made.only(stage).path)
        assert found[-1][f"{unit}_seen"] == examples
        assert len(found) == examples // every
        for line in found:
            assert np.isfinite(line["loss"])
            assert 0 <= line["data_wait_share"] <= 1
            assert line[f"{unit}_per_second"] > 0
        assert found[-1]["loss"] < found[0]["loss"]


def test_the_rate_in_a_manifest_is_that_of_the_whole_run() -> None:
    fast = {"pairs_seen": 900, "pairs_per_second": 90.0, "data_wait_share": 0.0}
    slow = {"pairs_seen": 1000, "pairs_per_second": 2.5, "data_wait_share": 0.5}
    found = over_all([fast, slow], "pairs")
    assert found == {"pairs_per_second": 1000 / 50, "data_wait_share": 0.4}
    assert over_all([fast], "pairs") == {"pairs_per_second": 90.0, "data_wait_share": 0.0}


def test_a_teachers_metrics_show_bits_per_dimension_of_training_and_heldout_images(made: Lab) -> None:
    for line in lines(made.only("teacher").path):
        assert {"train_bpd", "heldout_bpd"} <= set(line)
    metrics = made.only("teacher").manifest()["metrics"]
    assert metrics["heldout_bpd"] == pytest.approx(metrics["train_bpd"], abs=0.5)


def test_sigma_f_is_measured_again_the_same_with_the_weights_on_disk(made: Lab) -> None:
    folder = made.only("teacher").path
    model, facts = teacher.load(folder)
    config = TeacherConfig(**made.only("teacher").manifest()["config"])
    split = ImageDataset.open(made.only("data").path, "train")
    power, bpd = teacher.likelihood(model, split, range(256), config)
    assert power**0.5 == pytest.approx(facts["sigma_f"], rel=1e-6)
    assert bpd == pytest.approx(made.only("teacher").manifest()["metrics"]["train_bpd"], abs=1e-4)


def test_a_trained_teacher_inverts_itself(made: Lab) -> None:
    model, _ = teacher.load(made.only("teacher").path)
    split = ImageDataset.open(made.only("data").path, "heldout")
    rows = np.arange(16)
    image, label = torch.from_numpy(split.to_float(split.images(rows))), torch.from_numpy(split.labels(rows))
    with torch.no_grad():
        z, _ = model.encode(image, label)
        assert (model.decode(z, label) - image).abs().max() < 1e-4
        assert (z - image).abs().max() > 0.1


def test_weights_load_into_the_models_that_they_came_from(made: Lab) -> None:
    assert not student.load(made.only("student").path).training
    count = sum(parameter.numel() for parameter in student.load(made.only("student").path).parameters())
    assert count == made.only("student").manifest()["metrics"]["parameters"]
    network = features.load(made.only("features").path)
    images = ImageDataset.open(made.only("data").path, "heldout").images(np.arange(10))
    whole, alone = features.extract(network, images), features.extract(network, images[3:4])
    np.testing.assert_allclose(whole[3], alone[0], atol=1e-5)


def test_the_classifier_has_learnt_the_digits(made: Lab) -> None:
    assert made.only("features").manifest()["metrics"]["heldout_accuracy"] > 0.7


def test_damaged_weights_are_named(lab: Lab) -> None:
    path = lab.only("student").path / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(StageError, match=r"weights\.safetensors: its SHA-256 is not the manifest's"):
        student.load(path.parent)


def test_whole_batches_are_trained_and_the_rest_is_rounded_up() -> None:
    plan = recipe(student.StudentConfig(batch_size=64), 1000)
    assert (plan.examples, plan.warmup_examples) == (1024, int(0.05 * 1024))


def test_a_device_that_is_not_there_is_refused_and_auto_takes_what_there_is() -> None:
    assert machine.pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert machine.pick_device("cpu") == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(StageError, match="set device to 'auto' or 'cpu'"):
            machine.pick_device("cuda:3")


def test_training_tells_how_far_it_is_from_its_first_step_on(made: Lab, tmp_path: Path) -> None:
    """Long before the first `log_every`: the reporter decides what of it is shown."""
    recorder = Recorder(patience=6)
    config = TeacherConfig(**made.only("teacher").manifest()["config"] | {"log_every": 1_000_000})
    with pytest.raises(Stopped):
        teacher.run(config, {"data": made.only("data").path}, tmp_path, recorder)
    done = [count for count, _, unit in recorder.seen if unit == "images"]
    assert done[:4] == [0, 64, 128, 192]
