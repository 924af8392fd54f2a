"""The evaluation: every distance beside the floor, from whatever inputs there are, resumable row by row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from nfm.stages.base import Result, StageError, Stopped
from nfm.stages.evaluation import distances, stage
from nfm.stages.evaluation.config import EvaluateConfig
from nfm.stages.evaluation.table import as_text, columns_of
from nfm.stages.report.evaluation import Evaluation
from nfm.stages.trained import student
from nfm.stages.trained.student import StudentConfig
from nfm.storage import DatasetWriter, ImageDataset
from nfm.storage.files import atomic
from nfm.trainers.checkpoint import pack_weights, unpack_weights
from tests.support.recorder import Recorder

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


def test_a_baseline_that_is_the_runs_own_student_is_told(made: Lab, tmp_path: Path) -> None:
    roles = {role: made.only(role).path for role in ("data", "features", "student")}
    (tmp_path / "out").mkdir()
    report = Recorder(patience=0)
    with pytest.raises(Stopped):
        stage.run(EvaluateConfig(**SMALL, baselines=["nfm"]), roles, tmp_path / "out", report)
    assert "evaluate.baselines names nfm, which is the run's own student: it has one row" in report.said
