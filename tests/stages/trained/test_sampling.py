"""Samples: the same noise for every sampler, independent of batches; NFE as stated; nothing hidden in a figure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from nfm.stages.base import StageError
from nfm.stages.trained import sampling, student
from nfm.storage import ImageDataset
from nfm.storage.files import atomic
from nfm.storage.format import philox
from nfm.trainers import flow_matching
from nfm.trainers.nfe import COSTS
from nfm.trainers.nfe import DIFFUSIONS as NOISES
from nfm.trainers.nfe import GRIDS as TIMES

if TYPE_CHECKING:
    from tests.conftest import Lab


def source_of(made: Lab) -> ImageDataset:
    return ImageDataset.open(made.only("data").path, "train")


def test_the_ith_sample_does_not_depend_on_the_batch_size(made: Lab) -> None:
    sampler = sampling.student_sampler(made.only("student").path, 5, "cpu", "float32")
    source = source_of(made)
    whole, parts = (np.concatenate(list(sampling.draw(sampler.decode, source, 20, 1, size, "cpu"))) for size in (20, 7))
    assert whole.shape == (20, 1, 8, 8)
    np.testing.assert_allclose(whole, parts, atol=1e-5)
    other = np.concatenate(list(sampling.draw(sampler.decode, source, 20, 2, 20, "cpu")))
    assert np.abs(other - whole).max() > 0.1


def test_every_sampler_starts_from_the_same_standard_normal_noise_and_training_labels(made: Lab) -> None:
    source = source_of(made)
    noise, labels = sampling.initial(source, np.arange(300), 1, "cpu")
    expected = philox.normals(1, 0, np.arange(300), 64, purpose="samples").reshape(300, 1, 8, 8)
    np.testing.assert_array_equal(noise.numpy(), expected)
    np.testing.assert_array_equal(labels.numpy(), source.labels(np.arange(300) % len(source)))
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05


@pytest.mark.parametrize(("nfe", "method"), [(1, "euler"), (5, "euler"), (7, "heun"), (15, "heun")])
def test_a_student_is_evaluated_as_often_as_its_row_says(made: Lab, nfe: int, method: str) -> None:
    sampler = sampling.student_sampler(made.only("student").path, nfe, "cpu", "float32")
    assert (sampler.name, sampler.sampler, sampler.nfe) == (f"student-nfm-{method}-{nfe}", method, nfe)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    noise, labels = sampling.initial(source_of(made), np.arange(2), 0, "cpu")
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: count() if type(module).__name__ == "SiT" else None
    )
    try:
        with torch.no_grad():
            sampler.decode(noise, labels)
    finally:
        hook.remove()
    assert calls == nfe


def test_the_teachers_samples_are_its_inverse_and_its_score_step_changes_them(made: Lab) -> None:
    folder = made.only("teacher").path
    plain, denoised = (sampling.teacher_sampler(folder, 0.0, score, "cpu", "float32") for score in (False, True))
    assert [(s.name, s.sampler, s.nfe) for s in (plain, denoised)] == [
        ("teacher", "inverse", 1),
        ("teacher-score", "inverse+score", 2),
    ]
    noise, labels = sampling.initial(source_of(made), np.arange(8), 0, "cpu")
    with torch.no_grad():
        rough, smooth = plain.decode(noise, labels), denoised.decode(noise, labels)
    assert torch.isfinite(smooth).all()
    assert not torch.equal(rough, smooth)
    assert (rough - smooth).abs().mean() < 0.5


def test_guidance_changes_the_teachers_samples(made: Lab) -> None:
    folder = made.only("teacher").path
    noise, labels = sampling.initial(source_of(made), np.arange(8), 0, "cpu")
    with torch.no_grad():
        plain = sampling.teacher_sampler(folder, 0.0, False, "cpu", "float32").decode(noise, labels)
        guided = sampling.teacher_sampler(folder, 2.0, False, "cpu", "float32")
        assert not torch.equal(guided.decode(noise, labels), plain)
    assert guided.guidance == 2.0


@pytest.mark.parametrize(("nfe", "solver"), [(6, "euler"), (6, "midpoint"), (8, "rk4"), (3, "heun")])
def test_any_solver_and_grid_can_be_named(made: Lab, nfe: int, solver: str) -> None:
    folder = made.only("student").path
    noise, labels = sampling.initial(source_of(made), np.arange(4), 0, "cpu")
    square, uniform = (
        sampling.student_sampler(folder, nfe, "cpu", "float32", solver, grid).decode(noise, labels)
        for grid in ("square", "uniform")
    )
    assert not torch.allclose(square, uniform)


def test_a_students_guidance_moves_it_from_its_velocity_without_labels(made: Lab) -> None:
    folder = made.only("student").path
    noise, labels = sampling.initial(source_of(made), np.arange(8), 0, "cpu")
    model = student.load(folder)
    with torch.no_grad():
        plain, without = (flow_matching.velocity(model, y)(noise, 0.5) for y in (labels, torch.full_like(labels, -1)))
        guided = flow_matching.velocity(model, labels, 1.5)(noise, 0.5)
        assert not torch.allclose(plain, without)
        torch.testing.assert_close(guided, plain + 1.5 * (plain - without))
        same = sampling.student_sampler(folder, 3, "cpu", "float32").decode(noise, labels)
        moved = sampling.student_sampler(folder, 3, "cpu", "float32", guidance=1.5)
        assert not torch.allclose(moved.decode(noise, labels), same)
    assert (moved.guidance, moved.nfe) == (1.5, 3)


def test_a_student_is_guided_at_the_times_of_its_interval_alone(made: Lab) -> None:
    folder = made.only("student").path
    noise, labels = sampling.initial(source_of(made), np.arange(8), 0, "cpu")
    model = student.load(folder)
    with torch.no_grad():
        inside = flow_matching.velocity(model, labels, 1.5, (0.25, 0.75))
        for t, guided in ((0.2, False), (0.25, True), (0.75, True), (0.8, False)):
            assert torch.equal(inside(noise, t), flow_matching.velocity(model, labels, 1.5 * guided)(noise, t))
        always, within = (
            sampling.student_sampler(folder, 7, "cpu", "float32", guidance=1.5, interval=interval)
            for interval in ((0.0, 1.0), (0.25, 0.75))
        )
        assert not torch.equal(always.decode(noise, labels), within.decode(noise, labels))


def test_options_of_guidance_change_samples_or_are_refused_by_name(lab: Lab) -> None:
    for stage, options in (
        ("teacher", ["--constant-guidance"]),
        ("teacher", ["--attention-temperature", 1.5]),
        ("teacher", ["--guide", "a"]),
        ("student", ["--guidance-interval", "0.3,0.6"]),
    ):
        name, shown = lab.name(stage), set()
        for more in ([], options):
            lab.nfm("sample", name, "-n", 2, "-o", "grid.png", "--guidance", 2, *more)
            shown.add((lab.folder / "grid.png").read_bytes())
        assert len(shown) == 2, "the option changed nothing"
        other = lab.name("student" if stage == "teacher" else "teacher")
        said = lab.nfm("sample", other, "--guidance", 2, *options, exits=2).stderr
        assert f"{options[0]} is of a {stage}'s samples" in said
        said = lab.nfm("sample", name, *options, exits=2).stderr
        assert "give --guidance too" in said
    said = lab.nfm("sample", name, "--guidance", 2, "--guidance-interval", "0.6,0.3", exits=2).stderr
    assert "it begins before it ends" in said


def test_a_student_that_never_missed_its_labels_cannot_be_guided(made: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(made.only("student").path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["label_drop"] = 0.0
    del manifest["digest"]
    (folder / "manifest.json").unlink()
    atomic.write_json(folder / "manifest.json", manifest)
    with pytest.raises(StageError, match=r"label_drop = 0 and is undefined.*student.label_drop = 0.1"):
        sampling.student_sampler(folder, 3, "cpu", "float32", guidance=1.0)


def test_a_row_is_named_after_the_variant_in_the_manifest_and_serves_as_a_file(made: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(made.only("student").path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["metrics"]["variant"] = "nfm:soften=0.5"
    del manifest["digest"]
    (folder / "manifest.json").unlink()
    atomic.write_json(folder / "manifest.json", manifest)
    sampler = sampling.student_sampler(folder, 7, "cpu", "float32")
    assert (sampler.coupling, sampler.name) == ("nfm:soften=0.5", "student-nfm-soften-0.5-heun-7")


def test_the_reference_takes_the_evaluations_that_it_needs_and_the_others_come_to_it(made: Lab) -> None:
    pytest.importorskip("torchdiffeq")
    folder = made.only("student").path
    reference = sampling.reference_sampler(folder, "cpu", "float32")
    assert (reference.name, reference.sampler) == ("student-nfm-dopri5", "dopri5")
    noise, labels = sampling.initial(source_of(made), np.arange(6), 0, "cpu")
    exact = reference.decode(noise, labels)
    assert reference.taken is not None
    assert len(reference.taken) == 1
    assert reference.taken[0] >= 13  # two steps of dopri5 at least
    ways = [("euler", 1), ("rk4", 128)]
    samplers = (sampling.student_sampler(folder, nfe, "cpu", "float32", solver) for solver, nfe in ways)
    rough, fine = (float((sampler.decode(noise, labels) - exact).abs().max()) for sampler in samplers)
    assert fine < min(1e-3, rough / 10)


def test_the_noise_of_a_stochastic_solver_is_a_samples_own_whatever_the_batch(made: Lab) -> None:
    source, folder = source_of(made), made.only("student").path
    for solver, nfe in (("sde-euler", 6), ("sde-heun", 7)):
        sampler = sampling.student_sampler(folder, nfe, "cpu", "float32", solver)
        assert sampler.name == f"student-nfm-{solver}-{nfe}"

        def images(seed: int, size: int, decode: sampling.Decode = sampler.decode) -> np.ndarray:
            return np.concatenate(list(sampling.draw(decode, source, 20, seed, size, "cpu")))

        whole = images(1, 20)
        np.testing.assert_allclose(whole, images(1, 7), atol=1e-5)
        assert np.abs(images(2, 20) - whole).max() > 0.1
    noise, labels = sampling.initial(source, np.arange(2), 1, "cpu")
    first, second = (sampling.fresh_noise(1, np.arange(2), noise)(step) for step in (0, 1))
    assert len({float(value) for part in (noise, first, second) for value in part.flatten()}) == 6 * noise[0].numel()
    other = sampling.student_sampler(folder, 7, "cpu", "float32", "sde-heun", diffusion="sin^2")
    for_two = sampling.fresh_noise(1, np.arange(2), noise)
    with torch.no_grad():
        assert not torch.equal(other.decode(noise, labels, for_two), sampler.decode(noise, labels, for_two))
    with pytest.raises(ValueError, match="adds noise, and there is none"):
        sampler.decode(noise, labels)


def test_the_names_of_solvers_and_grids_are_those_of_the_mathematics() -> None:
    assert list(sampling.DIFFUSIONS) == list(NOISES)
    assert set(sampling.SOLVERS) == {"auto", *COSTS}
    assert set(sampling.GRIDS) == set(TIMES)


def test_a_grid_wants_a_model_and_evaluations_that_its_solver_can_spend(made: Lab, tmp_path: Path) -> None:
    folder = made.only("student").path
    for nfe, solver, said in ((6, "auto", "--nfe: .*odd"), (0, "auto", "nfe = 0"), (6, "rk4", "use 4 or 8")):
        with pytest.raises(StageError, match=said):
            sampling.sample_grid(folder, "student", 4, nfe, 0, tmp_path / "x.png", solver)
    with pytest.raises(StageError, match="there are uniform, square"):
        sampling.sample_grid(folder, "student", 4, 4, 0, tmp_path / "x.png", grid="cubic")
    with pytest.raises(StageError, match="name a student or a teacher"):
        sampling.sample_grid(made.only("data").path, "data", 4, 5, 0, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
