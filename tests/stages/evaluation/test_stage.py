"""The evaluation: every distance beside the floor, from whatever inputs there are, resumable row by row."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from nfm.stages.base import Result, StageError, Stopped, Unfit
from nfm.stages.evaluation import distances, inception, stage
from nfm.stages.evaluation.config import EvaluateConfig
from nfm.stages.evaluation.table import COLUMNS, PUBLISHED, as_text, columns_of, distance_key, published_key
from nfm.stages.report.evaluation import Evaluation
from nfm.stages.trained import student
from nfm.stages.trained.student import StudentConfig
from nfm.storage import DatasetWriter, ImageDataset
from nfm.storage.files import atomic
from nfm.trainers.checkpoint import pack_weights, unpack_weights
from tests.support.recorder import Recorder
from tests.support.torchvision_stub import make_importable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.conftest import Lab

SMALL: dict[str, Any] = {
    "nfe": [2, 1], "samples": 60, "kid_subsets": 2, "kid_size": 30, "curvature_trajectories": 4, "speed_batches": [4],
}  # fmt: skip
METRICS = {
    "fd_cnn", "kid", "kid_error", "precision", "recall", "density", "coverage", "sliced_wasserstein",
    "agreement", "nearest",
}  # fmt: skip


def evaluated(made: Lab, out: Path, *roles: str, **options: Any) -> tuple[dict[str, Any], Result]:
    out.mkdir(exist_ok=True)
    inputs = {role: made.only(role.partition(":")[0], role.partition(":")[2] or "nfm").path for role in roles}
    result = stage.run(EvaluateConfig(**(SMALL | options)), inputs, out, Recorder())
    return json.loads((out / stage.TABLE).read_text()), result


def names(body: dict[str, Any]) -> list[str]:
    return [row["name"] for row in body["rows"]]


def test_a_plan_tells_which_numbers_of_images_are_more_than_there_are() -> None:
    facts = {"inputs": ["data", "student"], "image_shape": [1, 8, 8], "classes": 10, "student": StudentConfig()}
    asked = {"samples": 400, "kid_size": 350}
    for held, train, told in (
        (400, 400, []),
        (400, 340, ["kid_size is 350: the subsets of KID have 340", "the training set has 340 images: precision"]),
        (60, 400, ["evaluate.samples is 400, and 60 images are held out: each row has 60", "KID have 60 images"]),
    ):
        config = EvaluateConfig(**SMALL | asked)
        words = str(stage.cost(config, facts | {"heldout": held, "images": train}, None))
        assert all(said in words for said in told), words
        assert told or " is 350" not in words


def test_an_evaluation_of_fewer_images_than_it_was_asked_for_says_so_wherever_it_is_shown(
    made: Lab, tmp_path: Path
) -> None:
    inputs, report = {role: made.only(role).path for role in ("data", "features")}, Recorder()
    heldout = len(ImageDataset.open(inputs["data"], "heldout"))
    stage.run(EvaluateConfig(**SMALL | {"samples": 7_654, "kid_size": 4_321}), inputs, tmp_path, report)
    told = f"evaluate.samples is 7,654, and {heldout} images are held out: each row has {heldout}"
    for shown in ("\n".join(report.said), (tmp_path / stage.TEXT).read_text(), Evaluation(tmp_path, 4).section()):
        assert told in shown
        assert f"evaluate.kid_size is 4,321: the subsets of KID have {heldout}" in shown
    body = json.loads((tmp_path / stage.TABLE).read_text())
    assert told not in as_text(body | {"cut": []})


def test_every_row_has_every_metric_and_the_floor_is_best(made: Lab, tmp_path: Path) -> None:
    body, result = evaluated(made, tmp_path, "data", "features", "student", "student:independent", "teacher")
    assert names(body) == [
        "floor", "teacher", "teacher-score", "student-nfm-euler-2", "student-nfm-euler-1",
        "student-independent-euler-2", "student-independent-euler-1",
    ]  # fmt: skip
    for row in body["rows"]:
        assert row.keys() >= METRICS
        assert all(np.isfinite(row[key]) for key in METRICS), row
        assert row["samples"] == 60
        assert row["name"] == "floor" or row["images_per_second"] > 0
    floor, *others = body["rows"]
    for key in ("fd_cnn", "kid", "sliced_wasserstein"):
        assert floor[key] < min(row[key] for row in others)
    assert floor["nearest"] > 0
    assert [row["coupling"] for row in body["curvature"]] == ["nfm", "independent"]
    assert result.metrics["FD-CNN floor"] == floor["fd_cnn"]
    assert list(result.payload) == [stage.DISTANCES]
    told = json.loads((tmp_path / stage.DISTANCES).read_text())["rows"]
    assert not {key for row in told for key in row} & set(stage.OF_THE_MOMENT)
    assert {row["machine"] for row in body["rows"]} == {body["machine"]} != {""}
    assert [row["guidance"] for row in body["curvature"]] == [0.0, 0.0]
    assert told[0].keys() >= METRICS
    assert "FD-CNN" in Evaluation(tmp_path, 4).section()


def test_one_student_or_the_teacher_alone_can_be_evaluated_and_rows_are_the_same(made: Lab, tmp_path: Path) -> None:
    student, _ = evaluated(made, tmp_path / "s", "data", "features", "student")
    teacher, _ = evaluated(made, tmp_path / "t", "data", "features", "teacher", guidance=1.5)
    assert names(student) == ["floor", "student-nfm-euler-2", "student-nfm-euler-1"]
    assert names(teacher) == ["floor", "teacher", "teacher-score", "teacher-guided", "teacher-guided-score"]
    assert [row["guidance"] for row in teacher["rows"]] == [None, 0.0, 0.0, 1.5, 1.5]
    assert student["rows"][0] == teacher["rows"][0]
    assert teacher["curvature"] == []
    guided = teacher["rows"][3]
    assert guided["fd_cnn"] != teacher["rows"][1]["fd_cnn"]


def test_solver_grid_and_guidance_change_a_students_rows(made: Lab, tmp_path: Path) -> None:
    roles = ("data", "features", "student")
    plain, _ = evaluated(made, tmp_path / "a", *roles, nfe=[4])
    ways: list[dict[str, Any]] = [{"solver": "midpoint"}, {"grid": "uniform"}, {"student_guidance": 2.0}]
    ways += [{"solver": "sde-euler"}, {"solver": "sde-euler", "diffusion": "constant"}]
    for number, way in enumerate(ways):
        other, _ = evaluated(made, tmp_path / str(number), *roles, nfe=[4], **way)
        assert other["rows"][1]["fd_cnn"] != plain["rows"][1]["fd_cnn"]
        assert other["rows"][1]["guidance"] == way.get("student_guidance", 0.0)
    assert names(plain)[1] == "student-nfm-euler-4"
    assert names(other)[1] == "student-nfm-sde-euler-4"
    assert "noise of the solver: constant" in as_text(other)


def test_the_reference_is_a_row_more_with_the_evaluations_that_it_took(made: Lab, tmp_path: Path) -> None:
    pytest.importorskip("torchdiffeq")
    roles = ("data", "features", "student")
    body, _ = evaluated(made, tmp_path, *roles, nfe=[1, 63], reference=True, batch_size=30)
    assert names(body) == ["floor", "student-nfm-euler-1", "student-nfm-heun-63", "student-nfm-dopri5"]
    one, many, reference = body["rows"][1:]
    assert reference["sampler"] == "dopri5"
    assert isinstance(reference["nfe"], int)
    assert reference["nfe"] >= 13
    assert abs(many["fd_cnn"] - reference["fd_cnn"]) < 0.1 * abs(one["fd_cnn"] - reference["fd_cnn"])
    assert (tmp_path / stage.SAMPLES / "student-nfm-dopri5.npz").exists()


def test_a_sample_that_is_not_finite_stops_the_evaluation_with_its_row(made: Lab, tmp_path: Path) -> None:
    roles = {role: made.only(role).path for role in ("data", "features", "student")}
    broken = tmp_path / "student"
    shutil.copytree(roles["student"], broken)
    state, architecture = unpack_weights((broken / "weights.safetensors").read_bytes())
    model = student.load(broken)
    next(iter(model.parameters())).data.fill_(float("nan"))
    (broken / "weights.safetensors").unlink()
    (broken / "weights.safetensors").write_bytes(pack_weights(model, architecture))
    assert state.keys() == model.state_dict().keys()
    body = atomic.read_json(broken / "manifest.json")
    listed = {"path": "weights.safetensors", "sha256": atomic.hash_file(broken / "weights.safetensors")[0]}
    (broken / "manifest.json").unlink()
    atomic.write_json(broken / "manifest.json", body | {"files": [listed]})
    (tmp_path / "out").mkdir()
    says = r"row student-nfm-euler-2: 60 of 60 samples .*not finite.*precision.*: look at"
    with pytest.raises(StageError, match=says) as caught:
        stage.run(EvaluateConfig(**SMALL), roles | {"student": broken}, tmp_path / "out", Recorder())
    assert "use evaluate.precision" not in str(caught.value), "which is float32 already"
    assert not list((tmp_path / "out" / stage.ROWS).glob("student*")), "no figure was made of it"


def test_a_stopped_evaluation_goes_on_with_the_next_row(made: Lab, tmp_path: Path) -> None:
    roles = {role: made.only(role).path for role in ("data", "features", "student")}
    config = EvaluateConfig(**SMALL)

    class Stopping(Recorder):
        @property
        def stopping(self) -> bool:
            return len(list((tmp_path / stage.ROWS).glob("*"))) >= 2

    with pytest.raises(Stopped):
        stage.run(config, roles, tmp_path, Stopping())
    first = tmp_path / stage.ROWS / "floor.json"
    before = first.stat().st_mtime_ns
    stage.run(config, roles, tmp_path, Recorder())
    assert first.stat().st_mtime_ns == before
    assert len(list((tmp_path / stage.ROWS).glob("*"))) == 4


def test_agreement_and_the_nearest_image_of_the_training_set_itself_are_perfect(made: Lab, tmp_path: Path) -> None:
    inputs = {"data": made.only("data").path, "features": made.only("features").path}
    source = ImageDataset.open(inputs["data"], "train")
    reference = distances.Reference(EvaluateConfig(**SMALL), inputs, source, 60, "cpu", Recorder())
    images, labels = source.images(reference.subset), source.labels(reference.subset)
    same = reference.distances(images, labels)
    assert same["nearest"] == 0
    assert same["sliced_wasserstein"] == 0
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    asked_for_others = reference.distances(images, (labels + 1) % 10)["agreement"]
    assert asked_for_others <= 1 - same["agreement"]
    noisy = np.clip(images.astype(float) + 40 * np.random.default_rng(0).standard_normal(images.shape), 0, 255)
    far = reference.distances(noisy.astype(np.uint8), labels)
    for key in ("fd_cnn", "nearest", "sliced_wasserstein"):
        assert far[key] > same[key]


def test_the_training_sets_features_are_taken_once_for_all_evaluations_of_a_process(made: Lab, tmp_path: Path) -> None:
    inputs = {"data": made.only("data").path, "features": made.only("features").path}
    source = ImageDataset.open(inputs["data"], "train")

    def taken(features: Path, split: ImageDataset = source) -> np.ndarray:
        config = EvaluateConfig(**SMALL)
        return distances.Reference(config, {**inputs, "features": features}, split, 60, "cpu", Recorder()).features

    first, other = taken(inputs["features"]), tmp_path / "other"
    assert taken(inputs["features"]) is first
    assert len(taken(inputs["features"], ImageDataset.open(inputs["data"], "heldout"))) != len(first)
    shutil.copytree(inputs["features"], other)
    again = taken(inputs["features"])
    assert np.array_equal(again, first)
    assert taken(other) is not again, "another network"


def test_too_few_images_for_neighbours_leave_those_columns_empty(made: Lab, tmp_path: Path) -> None:
    body, _ = evaluated(made, tmp_path, "data", "features", samples=8)
    row = body["rows"][0]
    assert row["fd_infinity"] is None
    assert "precision" not in row
    titles = [column.title for column in columns_of(body["rows"])]
    assert "precision" not in titles
    assert "FD-CNN" in titles
    assert as_text(body).splitlines()[0].split()[0] == "model"


def test_the_distance_at_infinity_wants_twice_as_many_images_as_features(made: Lab) -> None:
    inputs = {"data": made.only("data").path, "features": made.only("features").path}
    source = ImageDataset.open(inputs["data"], "train")
    reference = distances.Reference(EvaluateConfig(**SMALL), inputs, source, 60, "cpu", Recorder())
    size = reference.features.shape[1]
    rows = np.arange(2 * size) % len(source)
    for count, known in ((2 * size, True), (2 * size - 1, False)):
        found = reference.distances(source.images(rows[:count]), source.labels(rows[:count]))
        assert (found["fd_infinity"] is not None) == known


def test_points_of_the_plane_are_measured_without_features(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    writer = DatasetWriter(tmp_path / "data", "plane", (1, 1, 2), [], dtype="float32")
    for split, rows in (("train", 500), ("heldout", 200)):
        images = random.standard_normal((rows, 1, 1, 2)).astype(np.float32)
        keys = [f"{split}/{row}" for row in range(rows)]
        writer.write_split(split, rows, [(images, np.full(rows, -1), keys)])
    writer.close()
    config = EvaluateConfig(**(SMALL | {"features": "none", "samples": 150}))
    (tmp_path / "out").mkdir()
    result = stage.run(config, {"data": tmp_path / "data"}, tmp_path / "out", Recorder())
    row = json.loads((tmp_path / "out" / stage.TABLE).read_text())["rows"][0]
    assert 0.02 < row["w2"] < 0.6
    assert 0 < row["sliced_wasserstein"] < row["w2"]
    assert not {"fd_cnn", "kid", "precision", "nearest", "agreement"} & row.keys()
    assert result.metrics == {"W2 floor": row["w2"]}
    source = ImageDataset.open(tmp_path / "data", "train")
    reference = distances.Reference(config, {}, source, 150, "cpu", Recorder())
    shifted = reference.distances(source.images(reference.subset) + np.array([3, 4], np.float32), np.full(150, -1))
    assert shifted["w2"] == pytest.approx(5, rel=1e-5)


def test_many_points_are_measured_as_disjoint_sets_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distances, "EXACT_POINTS", 50)
    random = np.random.default_rng(0)
    writer = DatasetWriter(tmp_path, "plane", (1, 1, 2), [], dtype="float32")
    images = random.standard_normal((400, 1, 1, 2)).astype(np.float32)
    writer.write_split("train", 400, [(images, np.full(400, -1), [str(row) for row in range(400)])])
    writer.close()
    config = EvaluateConfig(**(SMALL | {"features": "none"}))
    source = ImageDataset.open(tmp_path, "train")

    def measured(shifts: Sequence[float]) -> dict[str, Any]:
        count = len(shifts)
        reference = distances.Reference(config, {}, source, count, "cpu", Recorder())
        moved = source.images(reference.subset) + np.array(shifts, np.float32).reshape(-1, 1, 1, 1)
        return reference.distances(moved, np.full(count, -1))

    # Two whole sets, shifted by 3 and by 5 along both axes; the 20 points that fill no set are far off and left out.
    row = measured([3] * 50 + [5] * 50 + [100] * 20)
    assert row["w2"] == pytest.approx(4 * 2**0.5, rel=1e-4)
    assert row["w2_error"] == pytest.approx(2**0.5, rel=1e-4)  # of two values that differ by 2 sqrt(2): half of it
    assert row["samples"] == 120
    assert (row["w2_points"], row["w2_sets"]) == (50, 2)
    titles = [column.title for column in columns_of([row])]
    place = titles.index("W2")
    assert titles[place : place + 4] == ["W2", "± s.e.", "points a set", "sets"]
    assert "w2_error" not in measured([3] * 70)  # one set has no spread


def test_images_of_many_values_are_not_compared_without_features(made: Lab, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r'these images have 64: use evaluate\.features = "cnn"'):
        evaluated(made, tmp_path, "data", features="none")
    with pytest.raises(StageError, match="no features artifact"):
        evaluated(made, tmp_path, "data")


def test_the_config_says_which_evaluations_a_solver_can_spend() -> None:
    assert EvaluateConfig(nfe=[8, 4], solver="rk4").nfe == (8, 4)
    for options, said in (
        ({"nfe": [8]}, "heun takes 2N - 1 evaluations, an odd number; use 7 or 9"),
        ({"nfe": [6], "solver": "rk4"}, "use 4 or 8"),
        ({"solver": "midpoint"}, "use 30 or 32"),
        ({"nfe": [7, 5, 7]}, "7 is named more than once"),
        ({"nfe": [8], "solver": "sde-heun"}, "use 7 or 9"),
        ({"diffusion": "constant"}, "'constant' is of solvers that add noise, sde-euler and sde-heun"),
        ({"diffusion": "cubic", "solver": "sde-euler"}, "'sigma', 'constant', 'sin.2' or 'decreasing'"),
        ({"baselines": ["nearest"]}, "coupling 'nearest' is unknown"),
    ):
        with pytest.raises(ValidationError, match=said):
            EvaluateConfig(**options)
    assert EvaluateConfig(baselines=["nfm:soften=0.50"]).baselines == ("nfm:soften=0.5",)


def test_options_at_their_defaults_are_no_part_of_the_identity() -> None:
    assert (
        not {"features", "solver", "grid", "reference", "student_guidance", "inception_weights", "ema", "diffusion"}
        & EvaluateConfig().semantic().keys()
    )
    assert EvaluateConfig(features="none").semantic()["features"] == "none"


def test_the_distance_has_one_name_in_config_row_and_columns() -> None:
    for features, key in (("cnn", "fd_cnn"), ("inception", "fid"), ("none", "w2")):
        assert distance_key(EvaluateConfig(features=features)) == key == distance_key({"name": "x", key: 1.0})
        assert key in {column.key for column in COLUMNS}
    with pytest.raises(ValueError, match="'x' holds no distance"):
        distance_key({"name": "x"})


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
        **SMALL | {"features": "inception", "inception_weights": str(untrained), "samples": 4},
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


def test_a_baseline_that_is_the_runs_own_student_is_told(made: Lab, tmp_path: Path) -> None:
    roles = {role: made.only(role).path for role in ("data", "features", "student")}
    (tmp_path / "out").mkdir()
    report = Recorder(patience=0)
    with pytest.raises(Stopped):
        stage.run(EvaluateConfig(**SMALL, baselines=["nfm"]), roles, tmp_path / "out", report)
    assert "evaluate.baselines names nfm, which is the run's own student: it has one row" in report.said


def test_an_interval_of_guidance_without_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"it says when students are guided, and evaluate\.student_guidance is 0"):
        EvaluateConfig(guidance_interval=(0.2, 0.8))
    assert EvaluateConfig(guidance_interval=(0.2, 0.8), student_guidance=1.0).guidance_interval == (0.2, 0.8)
    assert EvaluateConfig(guidance_interval=(0.0, 1.0)).student_guidance == 0
