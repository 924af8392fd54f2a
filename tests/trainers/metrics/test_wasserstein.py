"""The promises of the Wasserstein distances, against closed forms and POT."""

import numpy as np
import pytest
import torch

from nfm.trainers.metrics.wasserstein import sliced_wasserstein, wasserstein2


def points(n: int, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, size))


def test_wasserstein2_is_pots_exact_distance():
    ot = pytest.importorskip("ot")
    x, y = points(120, 2, 0), 1.5 * points(120, 2, 1) + 0.3
    assert wasserstein2(x, y) == pytest.approx(ot.emd2([], [], ot.dist(x, y)) ** 0.5, rel=1e-9)


def test_wasserstein2_of_a_shuffled_and_shifted_set_is_the_length_of_the_shift():
    x, shift = points(300, 2, 0), np.array([3.0, 4.0])
    assert wasserstein2(x, x[::-1] + shift) == pytest.approx(5.0, rel=1e-12)
    assert wasserstein2(x, x[::-1]) == 0.0


def test_wasserstein2_of_gaussians_nears_the_closed_form():
    # In one dimension W2^2 = (difference of means)^2 + (difference of scales)^2.
    x, y = points(800, 1, 0), 2 * points(800, 1, 1) + 1
    assert wasserstein2(x, y) == pytest.approx(2**0.5, rel=0.08)


def test_sliced_wasserstein_is_pots_on_the_same_directions():
    ot = pytest.importorskip("ot")
    x, y = points(100, 5, 0), 1.5 * points(70, 5, 1) + 0.3  # of different sizes
    directions = np.random.default_rng(7).standard_normal((5, 40))
    directions /= np.linalg.norm(directions, axis=0)
    expected = ot.sliced_wasserstein_distance(x, y, projections=directions)
    assert sliced_wasserstein(x, y, projections=40, seed=7) == pytest.approx(float(expected), rel=1e-9)


def test_sliced_wasserstein_of_a_shift_is_its_length_over_the_root_of_the_dimensions():
    x = points(200, 8, 0)
    y = x.copy()
    y[:, 0] += 4
    assert sliced_wasserstein(x, y[::-1], projections=4000) == pytest.approx(4 / 8**0.5, rel=0.05)
    assert sliced_wasserstein(x, x[::-1]) == pytest.approx(0.0, abs=1e-12)


def test_sliced_wasserstein_does_not_depend_on_repeating_the_points():
    x, y = points(30, 3, 0), points(20, 3, 1)
    assert sliced_wasserstein(np.tile(x, (2, 1)), y) == pytest.approx(sliced_wasserstein(x, y), rel=1e-9)


def test_sliced_wasserstein_depends_on_the_seed_alone():
    x, y = points(50, 4, 0), points(50, 4, 1)
    assert sliced_wasserstein(x, y, 16, seed=1) == sliced_wasserstein(x, y, 16, seed=1)
    assert sliced_wasserstein(x, y, 16, seed=1) != sliced_wasserstein(x, y, 16, seed=2)


@pytest.mark.parametrize("distance", [wasserstein2, sliced_wasserstein])
def test_images_are_points_and_tensors_are_arrays(distance):
    x, y = (points(40, 6, seed).astype(np.float32) for seed in (0, 1))
    images = [torch.from_numpy(part).reshape(40, 1, 2, 3).requires_grad_() for part in (x, y)]
    assert distance(*images) == distance(x, y)


@pytest.mark.parametrize("distance", [wasserstein2, sliced_wasserstein])
def test_points_that_cannot_be_compared_are_refused(distance):
    x = points(10, 2, 0)
    with pytest.raises(ValueError, match=r"\(10, 2\) and y \(10, 3\)"):
        distance(x, points(10, 3, 0))
    with pytest.raises(ValueError, match="y has 1 of 10 points"):
        distance(x, np.where(np.arange(20).reshape(10, 2) == 3, np.nan, x))


def test_an_assignment_of_different_numbers_of_points_is_refused():
    with pytest.raises(ValueError, match="x has 10 points and y 9"):
        wasserstein2(points(10, 2, 0), points(9, 2, 0))
