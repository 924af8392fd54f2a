"""Moments of dimensions and Kolmogorov-Smirnov on projections, compared with scipy and on noise with known faults."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from nfm.trainers.metrics.gaussianity import deviation, projected


def normal(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def test_moments_are_those_of_scipy_and_name_the_worst_dimension() -> None:
    z = normal(3000, 5)
    z[:, 2] = z[:, 2] * 2 + 0.5
    found, values = deviation(z), z.double().numpy()
    means, variances, kurtosis = values.mean(0), values.var(0) - 1, stats.kurtosis(values, axis=0)
    assert found.mean == pytest.approx(np.sqrt(np.square(means).mean()))
    assert found.mean_worst == pytest.approx(means[2])
    assert found.var == pytest.approx(np.sqrt(np.square(variances).mean()))
    assert found.var_worst == pytest.approx(variances[2])
    assert found.kurtosis == pytest.approx(np.sqrt(np.square(kurtosis).mean()), rel=1e-5)
    assert found.kurtosis_worst == pytest.approx(kurtosis[np.abs(kurtosis).argmax()], rel=1e-5)


def test_a_dimension_that_never_varies_has_finite_figures() -> None:
    z = normal(100, 3)
    z[:, 1] = 0
    assert all(np.isfinite(deviation(z)))
    assert deviation(z).var_worst == -1


def test_normal_projections_pass_and_a_shift_of_a_tenth_does_not() -> None:
    z = normal(8000, 30)
    good = projected(z, seed=1)
    assert good.p > 0.01
    assert good.statistic == pytest.approx(0.8687 / 8000**0.5, rel=0.15)
    assert projected(z + 0.1, seed=1).p < 1e-6
    assert projected(z, seed=1) == good
    assert projected(z, seed=2) != good


@pytest.mark.parametrize("count", [20, 500, 20_000])
@pytest.mark.parametrize("scale", [1.0, 1.1, 1.5])
def test_statistic_and_p_of_one_projection_are_those_of_scipys_exact_test(count: int, scale: float) -> None:
    z = normal(count, 1) * scale
    found = projected(z, 0, projections=1)
    sides = [stats.kstest(sign * z[:, 0].double().numpy(), "norm") for sign in (1, -1)]  # the direction is random
    right = min(sides, key=lambda side: abs(side.statistic - found.statistic))
    assert found.statistic == pytest.approx(right.statistic, abs=1e-6)
    assert found.p == pytest.approx(right.pvalue, rel=1e-3, abs=1e-12)
