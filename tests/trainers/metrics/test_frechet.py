"""The promises of the distances, against closed forms, torchmetrics and naive loops."""

import numpy as np
import pytest
import torch

from nfm.trainers.metrics.frechet import Gaussian, fd_infinity, fit, frechet_distance, kid
from nfm.trainers.metrics.nearest import nearest
from nfm.trainers.metrics.prdc import manifold, prdc
from tests.support.torchvision_stub import make_importable


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


def test_frechet_distance_to_given_moments_is_the_formula_of_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    found, root, mean = features(40, 6, 7), features(6, 6, 8), features(1, 6, 9)[0]
    covariance = root @ root.T
    own = torch.cov(found.T)
    cross = np.trace(linalg.sqrtm((own @ covariance).numpy())).real
    shift = (found.mean(dim=0) - mean).square().sum()
    expected = float(shift + own.trace() + covariance.trace() - 2 * cross)
    assert frechet_distance(found, Gaussian(mean, covariance)) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="of the same D"):
        frechet_distance(found[:, :5], Gaussian(mean, covariance))


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


def test_a_fitted_reference_is_as_good_as_its_features() -> None:
    a, b = features(200, 6, 0), features(300, 6, 1) + 0.3
    assert frechet_distance(a, fit(b)) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    with pytest.raises(ValueError, match=r"\(200, 6\) and \(50, 3\)"):
        frechet_distance(a, fit(features(50, 3, 2)))


def test_fewer_samples_than_features_have_the_distance_of_the_definition() -> None:
    few, many = features(9, 16, 0), features(200, 16, 1) + 0.2
    covariances = [torch.cov(x.T) for x in (few, many)]
    cross = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp_min(0).sqrt().sum()
    shift = (few.mean(dim=0) - many.mean(dim=0)).square().sum()
    expected = float(shift + covariances[0].trace() + covariances[1].trace() - 2 * cross)
    assert frechet_distance(few, many) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(many, few) == pytest.approx(expected, rel=1e-5)


class Identity(torch.nn.Module):
    """What torchmetrics takes for a network of 12 features: it gives back what it gets."""

    num_features = 12

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_torchmetrics_finds_the_same_frechet_distance_and_kid() -> None:
    make_importable()
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = features(400, 12, 0), features(500, 12, 1) * 1.2 + 0.1
    theirs = FrechetInceptionDistance(feature=Identity())
    # All features in every subset, so that the choice of subsets does not matter.
    kernel = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=400)
    for oracle in (theirs, kernel):
        oracle.update(b[:400], real=True)
        oracle.update(a, real=False)
    assert frechet_distance(a, b[:400]) == pytest.approx(float(theirs.compute()), rel=1e-6)
    assert kid(a, b[:400], subsets=1, size=400)[0] == pytest.approx(float(kernel.compute()[0]), rel=1e-4)


def test_fd_infinity_takes_the_bias_of_few_samples_away() -> None:
    reference = fit(features(50_000, 16, 0))
    for shift in (0.0, 0.5):
        few = features(600, 16, 1) + shift
        expected = 16 * shift**2
        biased, extrapolated = frechet_distance(few, reference), fd_infinity(few, reference)
        assert abs(extrapolated - expected) < max(0.1 * expected, 0.35 * (biased - expected))
    assert fd_infinity(few, reference, seed=1) == fd_infinity(few, reference, seed=1)
    for count, size, needed in ((19, 4, 20), (31, 16, 32)):
        with pytest.raises(ValueError, match=f"of {count} features of {size} values.* needs {needed} or more"):
            fd_infinity(features(count, size, 0), features(50, size, 0))
    assert np.isfinite(fd_infinity(features(32, 16, 0), features(50, 16, 0)))


@pytest.mark.parametrize("counts", [(40, 40), (1300, 70)])
def test_precision_recall_density_and_coverage_are_what_their_definitions_say(counts: tuple[int, int]) -> None:
    real, fake = features(counts[0], 3, 0), features(counts[1], 3, 1) * 0.7 + 0.5
    k = 5

    def radii(x: np.ndarray) -> np.ndarray:
        return np.sort(np.linalg.norm(x[:, None] - x[None], axis=2), axis=1)[:, k]

    gaps = np.linalg.norm(real.numpy()[:, None] - fake.numpy()[None], axis=2)
    inside = gaps <= radii(real.numpy())[:, None]
    expected = (
        inside.any(axis=0).mean(),
        (gaps <= radii(fake.numpy())[None]).any(axis=1).mean(),
        inside.sum(axis=0).mean() / k,
        inside.any(axis=1).mean(),
    )
    np.testing.assert_allclose(prdc(manifold(real), manifold(fake)), expected, atol=1e-12)


def test_modes_that_are_missing_cost_recall_and_coverage_and_not_precision() -> None:
    real = torch.cat([features(300, 4, 0), features(300, 4, 1) + 20])
    found = prdc(manifold(real), manifold(features(600, 4, 2)))
    assert found.precision > 0.9
    assert found.recall < 0.55
    assert found.coverage < 0.55
    same = prdc(manifold(real), manifold(torch.cat([features(300, 4, 3), features(300, 4, 4) + 20])))
    assert min(same) > 0.85
    assert same.density == pytest.approx(1, abs=0.15)


def test_a_set_too_small_for_its_neighbours_is_refused() -> None:
    with pytest.raises(ValueError, match="more than k = 5 rows"):
        manifold(features(5, 3, 0))


def test_the_nearest_image_is_found_in_any_chunk_and_its_distance_is_per_value() -> None:
    train, samples = features(503, 27, 0).float(), features(40, 27, 1).float()
    samples[7] = train[411]
    samples[8] = train[12] + 0.25
    gaps = (samples[:, None] - train[None]).square().mean(dim=2).sqrt()
    for size in (503, 100):
        distances, rows = nearest(samples.reshape(40, 3, 3, 3), train.reshape(503, 3, 3, 3).split(size))
        torch.testing.assert_close(distances, gaps.min(dim=1).values)
        torch.testing.assert_close(rows, gaps.argmin(dim=1))
    assert distances[7] == 0
    assert distances[8] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="no training images"):
        nearest(samples, [])
