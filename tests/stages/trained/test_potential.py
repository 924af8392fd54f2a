"""The potential stage on the digits: what it writes, resume after kills, and the coupling read back from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nfm.stages.base import StageError, Stopped
from nfm.stages.data import stage
from nfm.stages.trained import potential
from nfm.stages.trained.potential import PotentialConfig
from nfm.storage import ImageDataset
from nfm.trainers.checkpoint import pack, unpack
from tests.stages.pairs.shop import Heard
from tests.support.recorder import Recorder

CONFIG = PotentialConfig(samples=40_000, batch_size=256, check_every=10_000, save_every=5_000, device="cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    stage.run(stage.DataConfig(source="digits", limit=320), {}, folder, Recorder())
    return folder


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("potential")
    potential.run(CONFIG, {"data": digits}, folder, Recorder())
    return folder


def payload(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in (potential.VECTORS, potential.FACTS)]


def test_each_class_is_recorded_with_what_it_took_and_why_it_stopped(digits: Path, tmp_path: Path) -> None:
    report = Recorder()
    result = potential.run(CONFIG.model_copy(update={"chi2": 5e-3}), {"data": digits}, tmp_path, report)
    train = ImageDataset.open(digits, "train")
    counts = np.bincount(train.labels(np.arange(len(train))))
    facts = json.loads((tmp_path / potential.FACTS).read_text())
    assert [facts["classes"][str(label)]["rows"] for label in range(10)] == counts.tolist()
    assert {known["stopped"] for known in facts["classes"].values()} <= {"target", "budget"}
    for known in facts["classes"].values():
        assert (known["chi2"] <= 5e-3) == (known["stopped"] == "target")
        assert 0 < known["samples"] <= 40_192
        assert known["chi2_samples"] >= 2000
        assert known["chi2_error"] > 0
    assert result.metrics["chi2_worst"] == round(max(known["chi2"] for known in facts["classes"].values()), 6)
    assert result.metrics["samples"] == sum(known["samples"] for known in facts["classes"].values())
    assert "seconds" not in result.metrics
    assert list(result.payload) == [potential.VECTORS, potential.FACTS]
    assert all(done <= total and unit == "samples" for done, total, unit in report.seen)
    assert report.seen


def test_the_same_config_gives_the_same_bytes(digits: Path, whole: Path, tmp_path: Path) -> None:
    potential.run(CONFIG, {"data": digits}, tmp_path, Recorder())
    assert payload(tmp_path) == payload(whole)


def test_a_run_that_is_stopped_again_and_again_ends_in_the_same_bytes(
    digits: Path, whole: Path, tmp_path: Path
) -> None:
    stops = 0
    while True:
        try:
            potential.run(CONFIG, {"data": digits}, tmp_path, Recorder(patience=650))
            break
        except Stopped:
            stops += 1
            assert not (tmp_path / potential.FACTS).exists()
    assert stops > 2
    assert payload(tmp_path) == payload(whole)


def test_a_run_killed_between_two_saves_goes_on_from_the_last(digits: Path, whole: Path, tmp_path: Path) -> None:
    class Dies(Recorder):
        saves = 0

        def check_lock(self) -> None:
            self.saves += 1
            if self.saves == 12:
                raise KeyboardInterrupt  # before the file is replaced

    with pytest.raises(KeyboardInterrupt):
        potential.run(CONFIG, {"data": digits}, tmp_path, Dies())
    finished, _ = unpack((tmp_path / potential.FINISHED).read_bytes())
    assert 0 < len(finished) < 10
    _, in_hand = unpack((tmp_path / potential.CHECKPOINT).read_bytes())
    assert in_hand["label"] == len(finished)
    goes_on = Heard()
    potential.run(CONFIG, {"data": digits}, tmp_path, goes_on)
    steps = f"{in_hand['step']:,} steps of the next"
    assert goes_on.said[0] == f"continuing after {len(finished)} of 10 classes, and {steps}"
    assert payload(tmp_path) == payload(whole)


def test_the_coupling_gives_every_noise_an_image_of_its_class(digits: Path, whole: Path) -> None:
    train = ImageDataset.open(digits, "train")
    coupling = potential.load_coupling(whole, train, "cpu")
    labels = torch.from_numpy(np.tile(train.labels(np.arange(len(train))), 40))
    eps = torch.randn(len(labels), *train.image_shape, generator=torch.Generator().manual_seed(0))
    pairs = coupling(torch.zeros_like(eps), labels, eps)
    assert torch.equal(pairs.noise, eps)
    assert pairs.row is not None
    assert np.array_equal(train.labels(pairs.row.numpy()), labels.numpy())
    assert len(pairs.row.unique()) > 0.99 * len(train)
    images = torch.from_numpy(train.to_float(train.images(pairs.row.numpy())))
    own = torch.from_numpy(np.tile(train.to_float(train.images(np.arange(len(train)))), (40, 1, 1, 1)))
    assert (eps - images).square().mean() < (eps - own).square().mean() - 0.1  # the transport costs less


def test_data_without_classes_is_one_class(tmp_path: Path) -> None:
    source, out = tmp_path / "data", tmp_path / "out"
    images = np.random.default_rng(0).integers(0, 256, (60, 1, 4, 4), np.uint8)
    np.savez(tmp_path / "images.npz", data=images)
    source.mkdir()
    out.mkdir()
    stage.run(stage.DataConfig(source="npz", path=str(tmp_path / "images.npz")), {}, source, Recorder())
    potential.run(CONFIG, {"data": source}, out, Recorder())
    train = ImageDataset.open(source, "train")
    pairs = potential.load_coupling(out, train)(
        torch.zeros(5, 1, 4, 4),
        torch.full((5,), -1),
        torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)),
    )
    assert list(json.loads((out / potential.FACTS).read_text())["classes"]) == ["-1"]
    assert pairs.row is not None
    assert int(pairs.row.max()) < len(train)


def test_other_data_and_damaged_files_are_refused(digits: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"fitted on train of data .*, not on heldout"):
        potential.load_coupling(whole, ImageDataset.open(digits, "heldout"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / potential.FACTS).write_bytes((whole / potential.FACTS).read_bytes())
    (broken / potential.VECTORS).write_bytes((whole / potential.VECTORS).read_bytes()[:100])
    with pytest.raises(StageError, match=r"potential\.safetensors: 100 bytes are not a readable checkpoint"):
        potential.load_coupling(broken, ImageDataset.open(digits, "train"))
    for name, lost in ((potential.CHECKPOINT, "the class in hand"), (potential.FINISHED, "the finished classes")):
        for found in (b"no checkpoint", pack({}, {"of": "another format"})):
            (tmp_path / name).write_bytes(found)
            with pytest.raises(StageError, match=f"{name}: no state of a fit .* remove it to fit {lost} anew"):
                potential.run(CONFIG, {"data": digits}, tmp_path, Recorder())


def test_a_checkpoint_of_other_data_is_refused(digits: Path, tmp_path: Path) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    other.mkdir()
    out.mkdir()
    stage.run(stage.DataConfig(source="digits", limit=200), {}, other, Recorder())
    with pytest.raises(Stopped):
        potential.run(CONFIG, {"data": other}, out, Recorder(patience=300))
    with pytest.raises(StageError, match=r"label 0 has .* images there, .* in the data"):
        potential.run(CONFIG, {"data": digits}, out, Recorder())


def test_a_plan_says_how_many_noises_and_operations() -> None:
    cost = potential.cost(PotentialConfig(), {"images": 60_000, "image_shape": [1, 28, 28], "classes": 10}, None)
    assert str(cost) == "4,000,000 samples, at most, 3.8e+13 FLOPs"


def test_devices_and_saving_leave_the_fingerprint_alone() -> None:
    assert PotentialConfig().semantic() == PotentialConfig(device="cpu", save_every=7).semantic()
    assert PotentialConfig().semantic() != PotentialConfig(chi2=1e-2).semantic()
