"""Distances in the features of Inception-v3, and to published statistics: FID where both are the real ones."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from nfm.stages.base import StageError, Unfit
from nfm.stages.evaluation import inception, stage
from nfm.stages.evaluation.config import EvaluateConfig
from nfm.stages.evaluation.table import COLUMNS, PUBLISHED, published_key
from nfm.storage import DatasetWriter, ImageDataset
from tests.support.recorder import Recorder
from tests.support.torchvision_stub import make_importable


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception-v3 in the layout of the real file, with weights that were never trained: the real are not here."""
    make_importable()
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Untrained(module.FeatureExtractorInceptionV3):  # type: ignore[name-defined]
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            torch.manual_seed(0)
            for part in self.modules():
                if isinstance(part, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(part.weight)  # or the signal fades over so many layers

    folder = tmp_path_factory.mktemp("weights")
    torch.save({}, folder / "none.pth")
    network = Untrained("untrained", ["2048"], feature_extractor_weights_path=str(folder / "none.pth"))
    torch.save(network.state_dict(), folder / inception.WEIGHTS)
    return folder / inception.WEIGHTS


def small_pictures(folder: Path, channels: int = 1, dtype: str = "uint8", rows: int = 8) -> Path:
    random = np.random.default_rng(0)
    writer = DatasetWriter(folder, "pictures", (channels, 8, 8), ["a", "b"], dtype=dtype)
    for split in ("train", "heldout"):
        images = random.integers(0, 256, (rows, channels, 8, 8)).astype(dtype)
        writer.write_split(split, rows, [(images, np.arange(rows) % 2, [f"{split}/{row}" for row in range(rows)])])
    writer.close()
    return folder


@pytest.mark.seconds(60)
def test_in_the_features_of_inception_the_distance_is_called_fid(untrained: Path, tmp_path: Path) -> None:
    """And the distance to statistics of the training set is that to the training set."""
    data = small_pictures(tmp_path / "data", rows=4)
    source = ImageDataset.open(data, "train")
    network = inception.load(str(untrained), source, "cpu")
    known = inception.extract(network, source.images(np.arange(4))).astype(np.float64)
    np.savez(tmp_path / "known.npz", mu=known.mean(0), sigma=np.cov(known, rowvar=False))
    config = EvaluateConfig(
        features="inception",
        inception_weights=str(untrained),
        nfe=[2, 1],
        samples=4,
        kid_subsets=2,
        kid_size=30,
        speed_batches=[4],
        statistics=str(tmp_path / "known.npz"),
    )
    (tmp_path / "out").mkdir()
    recorder = Recorder()
    stage.run(config, {"data": data}, tmp_path / "out", recorder)
    (said,) = [text for text in recorder.said if "published FIDs are of 50,000" in text]
    assert "of 4 images a row" in said
    assert "so the distance is not called FID" in said
    text = (tmp_path / "out" / stage.TEXT).read_text()
    row = json.loads((tmp_path / "out" / stage.TABLE).read_text())["rows"][0]
    assert row["fid"] > 0
    assert row["fd_published"] == pytest.approx(row["fid"], rel=1e-5)
    assert "FID" in text
    assert "FD, published (other weights)" in text
    assert "FD-CNN" not in text
    assert not {"fd_cnn", "agreement"} & row.keys()
    grey = source.images(np.arange(1))
    found = inception.extract(network, grey)
    assert found.shape == (1, 2048)
    np.testing.assert_allclose(found, inception.extract(network, grey.repeat(3, axis=1)), rtol=1e-4)


def test_a_distance_to_published_statistics_is_called_fid_with_the_published_weights_alone(
    untrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvaluateConfig(features="inception", inception_weights=str(untrained))
    assert published_key(config) == "fd_published"
    monkeypatch.setattr(inception, "PUBLISHED", inception.weights_sha256(str(untrained))[:8])  # the real are not here
    assert published_key(config) == "fid_published"
    assert set(PUBLISHED) == {"fd_published", "fid_published"} <= {column.key for column in COLUMNS}


def test_statistics_are_part_of_the_identity_and_only_where_they_are_named(untrained: Path, tmp_path: Path) -> None:
    file, copy = tmp_path / "a.npz", tmp_path / "b.npz"
    for path in (file, copy):
        np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    without, one, other = (
        EvaluateConfig(features="inception", inception_weights=str(untrained), statistics=path and str(path))
        for path in (None, file, copy)
    )
    assert without.semantic() == one.semantic()
    assert stage.external(without) == {"inception_weights": inception.weights_sha256(str(untrained))}
    assert stage.external(one) == stage.external(other) != stage.external(without)
    np.savez(copy, mu=np.ones(2048), sigma=np.eye(2048))
    assert stage.external(one) != stage.external(other)
    with pytest.raises(ValidationError, match=r"they are of Inception's features; set evaluate\.features"):
        EvaluateConfig(statistics=str(file))


EYE = np.eye(2048, dtype=np.float32)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mu": np.zeros(2048)}, "it has no sigma, but mu"),
        ({"arr_0": np.zeros((2, 8, 8, 3))}, "it has no mu and no sigma, but arr_0"),
        ({"mu": np.zeros(768), "sigma": np.eye(768)}, "mu is 768 of float64, and statistics of .* have 2048 floats"),
        ({"mu": np.zeros(2048), "sigma": np.ones(2048)}, "sigma is 2048 of float64, .* have 2048x2048 floats"),
        ({"mu": np.zeros(2048, int), "sigma": EYE}, "mu is 2048 of int64"),
        ({"mu": np.full(2048, np.nan), "sigma": EYE}, "mu has values that are not finite"),
        ({"mu": np.zeros(2048), "sigma": np.triu(np.ones_like(EYE))}, "sigma is not symmetric"),
        ({"mu": np.zeros(2048), "sigma": -EYE}, "sigma has a negative variance"),
        ({"mu": np.array([{}]), "sigma": EYE}, "mu and sigma cannot be read"),
    ],
)
def test_statistics_that_are_none_are_refused_before_anything_is_computed(
    arrays: dict[str, Any], said: str, untrained: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(Unfit, match=rf"evaluate\.statistics = .*wrong\.npz': {said}"):
        checked(untrained, tmp_path / "wrong.npz")


def test_a_pickle_of_statistics_is_not_read(untrained: Path, tmp_path: Path) -> None:
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"fid": {"mu": np.zeros(2048)}}))
    with pytest.raises(Unfit, match=r"edm2\.pkl': no \.npz file; a pickle, as of EDM2, could run code and is not read"):
        checked(untrained, tmp_path / "edm2.pkl")
    with pytest.raises(Unfit, match="there is no such file"):
        checked(untrained, tmp_path / "none.npz")


def checked(weights: Path, file: Path) -> None:
    stage.check(EvaluateConfig(features="inception", inception_weights=str(weights), statistics=str(file)))


def test_weights_decide_the_identity_and_their_place_does_not(untrained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.pth"
    copy.write_bytes(untrained.read_bytes())
    here, there = (EvaluateConfig(features="inception", inception_weights=str(path)) for path in (untrained, copy))
    assert here.semantic() == there.semantic()
    assert stage.external(here) == stage.external(there) != {}
    copy.write_bytes(b"other")
    assert stage.external(here) != stage.external(there)
    assert stage.external(EvaluateConfig()) == {}


def test_what_is_missing_for_inception_is_told_with_the_remedy(tmp_path: Path) -> None:
    source = ImageDataset.open(small_pictures(tmp_path / "data"), "train")
    with pytest.raises(StageError, match=r"needs evaluate\.inception_weights: the path of pt_inception"):
        inception.load(None, source, "cpu")
    with pytest.raises(StageError, match="there is no such file; give the path"):
        inception.load(str(tmp_path / "gone.pth"), source, "cpu")
    wrong, garbage = tmp_path / "wrong.pth", tmp_path / "garbage.pth"
    torch.save({"a": torch.zeros(2)}, wrong)
    garbage.write_bytes(b"no weights at all")
    latents = ImageDataset.open(small_pictures(tmp_path / "latents", 4, "float32"), "train")
    with pytest.raises(StageError, match="the data has float32 images of 4"):
        inception.load(str(wrong), latents, "cpu")
    make_importable()
    pytest.importorskip("torch_fidelity")
    with pytest.raises(StageError, match="does not hold the Inception-v3 of FID"):
        inception.load(str(wrong), source, "cpu")
    with pytest.raises(StageError, match="no file of weights"):
        inception.load(str(garbage), source, "cpu")


def test_without_torch_fidelity_the_way_to_get_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    weights = tmp_path / "x.pth"
    weights.write_bytes(b"")
    source = ImageDataset.open(small_pictures(tmp_path / "data"), "train")
    with pytest.raises(StageError, match="pip install torch-fidelity"):
        inception.load(str(weights), source, "cpu")
