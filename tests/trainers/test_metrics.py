"""The promises of the distances, against closed forms."""

import numpy as np
import pytest
import torch

from nfm.trainers.metrics import frechet_distance, kid


def features(n: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(n: int, mean: torch.Tensor, root: torch.Tensor, seed: int) -> torch.Tensor:
    """Features whose sample mean is `mean` and whose sample covariance is root root^T, exactly."""
    x = features(n, len(mean), seed)
    x = x - x.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return white @ root.T + mean


def test_frechet_distance_of_gaussians_with_commuting_covariances_is_the_closed_form():
    # For diagonal covariances: |difference of means|^2 + sum (s_a - s_b)^2.
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 1.0, -1.0]).double()
    scale_a, scale_b = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 2.0, 0.5]).double()
    a = with_moments(500, mean_a, torch.diag(scale_a), 0)
    b = with_moments(300, mean_b, torch.diag(scale_b), 1)
    expected = float((mean_a - mean_b).square().sum() + (scale_a - scale_b).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_gaussians_in_general_position_is_the_trace_formula():
    roots = [torch.tril(features(4, 4, seed)) + 3 * torch.eye(4) for seed in (2, 3)]
    a, b = (with_moments(400, features(1, 4, seed)[0], root, seed) for seed, root in zip((4, 5), roots))
    covariances = [root @ root.T for root in roots]
    # tr (C_a C_b)^1/2 by the eigenvalues of the product, which are real and positive.
    cross = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.sqrt().sum()
    shift = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    expected = float(shift + covariances[0].trace() + covariances[1].trace() - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_zero_even_when_features_are_constant():
    a = features(200, 8, 0)
    a[:, 3] = 0.0
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)


def test_kid_is_zero_in_the_mean_for_equal_distributions():
    mean, error = kid(features(4000, 16, 0), features(4000, 16, 1), subsets=50, size=500)
    assert abs(mean) < 0.002
    assert 0 < error < 0.001


def test_kid_of_shifted_gaussians_is_the_closed_form():
    # With k(x, y) = (x.y / d + 1)^3, x ~ N(0, I), y ~ N(m, I): E[(x.y)^j] gives, with s = |m|^2,
    # MMD^2 = 3 s / d + 3 s^2 / d^2 + (s^3 + 6 s^2 + 3 (d + 2) s) / d^3.
    d, shift = 8, 0.5
    s = d * shift**2
    expected = 3 * s / d + 3 * s**2 / d**2 + (s**3 + 6 * s**2 + 3 * (d + 2) * s) / d**3
    mean, error = kid(features(20_000, d, 0), features(20_000, d, 1) + shift, subsets=40, size=1000)
    assert mean == pytest.approx(expected, rel=0.05)
    assert error < 0.05 * expected


def test_kid_of_sets_smaller_than_the_subset_uses_all_of_them():
    a, b = features(50, 4, 0), features(60, 4, 1) + 1
    mean, _ = kid(a, b, subsets=5, size=1000)
    assert mean > 0.1


def test_kid_depends_on_the_seed_alone_and_takes_arrays():
    a, b = features(300, 4, 0), features(300, 4, 1)
    same = kid(a, b, subsets=5, size=100, seed=3)
    assert same == kid(a.numpy(), b.numpy(), subsets=5, size=100, seed=3)
    assert same != kid(a, b, subsets=5, size=100, seed=4)


@pytest.mark.parametrize("distance", [frechet_distance, kid])
def test_features_that_cannot_be_compared_are_refused(distance):
    good = np.zeros((5, 3))
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 2\)"):
        distance(good, np.zeros((5, 2)))
    with pytest.raises(ValueError, match="1 of 5 rows"):
        distance(good, np.where(np.eye(5, 3) * [0, 1, 0] == 1, np.nan, 0.0))
