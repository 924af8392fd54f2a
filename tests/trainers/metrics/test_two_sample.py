"""The two-sample classifier finds differences that moments do not show, and none if there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from nfm.trainers.metrics.two_sample import area_under_curve, two_sample

N, SIDE = 600, 8


def normal(seed: int, count: int = N) -> Tensor:
    return torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def labels(count: int = N) -> Tensor:
    return torch.arange(count) % 10


def correlated_signs() -> Tensor:
    """Every value is exactly N(0, 1), and uncorrelated with its absolute neighbours'; signs come in equal pairs."""
    signs = normal(2).sign()
    signs[..., 1::2] = signs[..., 0::2]
    return normal(1).abs() * signs


def shuffled_blocks() -> Tensor:
    """The lower half of each record is its upper half, in another order that is the same for all records."""
    z = normal(3).flatten(1)
    half = z.shape[1] // 2
    z[:, half:] = z[:, torch.randperm(half, generator=torch.Generator().manual_seed(0))]
    return z.reshape(-1, 1, SIDE, SIDE)


@pytest.mark.parametrize("made", [correlated_signs, shuffled_blocks])
def test_it_finds_dependence_between_values_that_are_normal_one_by_one(made) -> None:
    z = made()
    assert abs(float(z.mean())) < 0.02
    assert abs(float(z.var()) - 1) < 0.02
    found = two_sample(z, labels(), 10)
    assert found.auc > 0.9
    assert found.heldout == 180
    assert found.trained == N - 180


def test_exact_noise_gives_one_half_within_its_error() -> None:
    found = two_sample(normal(11, 800), labels(800), 10)
    assert abs(found.auc - 0.5) < 3.5 * found.error
    assert found.error < 0.03


def test_a_small_lack_of_variance_is_found() -> None:
    found = two_sample(normal(4, 1200) * 0.85**0.5, labels(1200), 10)
    assert found.auc > 0.5 + 5 * found.error


def test_a_mismatch_within_one_class_is_found_by_its_label() -> None:
    """The two classes are shifted, opposite ways: without labels no mean shows anything."""
    z, own = normal(5), labels() % 2
    z = z + 0.3 * (2.0 * own - 1)[:, None, None, None]
    found = two_sample(z / z.std(), own, 2)
    assert found.auc > 0.7


def test_records_of_two_values_have_a_network_too() -> None:
    z = torch.randn(1500, 1, 1, 2, generator=torch.Generator().manual_seed(6))
    none = torch.full((1500,), -1)
    exact = two_sample(z, none, 0)
    assert abs(exact.auc - 0.5) < 3.5 * exact.error
    ring = z / z.flatten(1).norm(dim=1)[:, None, None, None] * 2**0.5
    assert two_sample(ring, none, 0).auc > 0.7


def test_the_same_seed_gives_the_same_figure_and_leaves_torchs_own_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = two_sample(normal(7, 200), labels(200), 10, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert first == two_sample(normal(7, 200), labels(200), 10, seed=1)
    assert first.auc != two_sample(normal(7, 200), labels(200), 10, seed=2).auc


def test_the_area_is_that_of_scikit_learn_and_its_error_that_of_repetition() -> None:
    random = np.random.default_rng(0)
    areas, errors = [], []
    for _ in range(200):
        ours, theirs = random.normal(0.5, 1, 150), random.normal(0, 1, 200)
        auc, error = area_under_curve(torch.tensor(ours), torch.tensor(theirs))
        areas.append(auc)
        errors.append(error)
    truth = np.repeat([1, 0], [150, 200])
    assert areas[-1] == pytest.approx(roc_auc_score(truth, np.concatenate([ours, theirs])))
    assert np.mean(errors) == pytest.approx(np.std(areas), rel=0.2)
    ties = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 0.0])
    assert area_under_curve(*ties)[0] == pytest.approx(roc_auc_score([1, 1, 1, 0, 0], [0, 1, 1, 1, 0]))
    assert area_under_curve(torch.ones(10), torch.zeros(10)) == (1.0, 0.025)


def test_too_few_records_and_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="19 records"):
        two_sample(normal(0, 19), labels(19), 10)
    broken = normal(0, 30)
    broken[3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="1 values not finite"):
        two_sample(broken, labels(30), 10)


def test_it_ends_soon_after_it_is_asked_to_stop() -> None:
    looks = iter([False, True])
    assert two_sample(normal(0), labels(), 10, stop=lambda: next(looks)) is None
