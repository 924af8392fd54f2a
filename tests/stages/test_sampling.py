"""Samples: the same noise for every sampler, independent of batches; NFE as stated; nothing hidden in a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from nfm.stages import sampling
from nfm.stages.stage import StageError
from nfm.storage import ImageDataset, philox

if TYPE_CHECKING:
    from tests.conftest import Lab


def source_of(made: Lab) -> ImageDataset:
    return ImageDataset.open(made.only("data").path, "train")


def test_the_ith_sample_does_not_depend_on_the_batch_size(made: Lab) -> None:
    sampler = sampling.student_sampler(made.only("student").path, "nfm", 5, "cpu", "float32")
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
    sampler = sampling.student_sampler(made.only("student").path, "nfm", nfe, "cpu", "float32")
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


def test_a_grid_wants_a_model_and_evaluations_that_its_solver_can_spend(made: Lab, tmp_path: Path) -> None:
    folder = made.only("student").path
    for nfe in (0, 6, 8):
        with pytest.raises(StageError, match="odd"):
            sampling.sample_grid(folder, "student", 4, nfe, 0, tmp_path / "x.png")
    with pytest.raises(StageError, match="name a student or a teacher"):
        sampling.sample_grid(made.only("data").path, "data", 4, 5, 0, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
