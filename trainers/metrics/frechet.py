"""Distances between sets of features: the Frechet distance of fitted Gaussians, at N and at infinity, and KID."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Features = Tensor | np.ndarray
FEWEST = 20  # samples needed for a fit against 1/N


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian fitted to `count` features, where that is known: mean [D] and covariance [D, D], float64."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    @cached_property
    def root(self) -> Tensor:
        """The square root of the covariance [D, D], computed once: it is the largest part of a distance's cost."""
        return _symmetric_root(self.covariance)


def fit(features: Features) -> Gaussian:
    """The Gaussian of features [N, D]. Keep it to compare many sets with one."""
    x = _checked("features", features)
    return Gaussian(x.mean(dim=0), torch.cov(x.T).reshape(x.shape[1], -1), len(x))


def frechet_distance(features_a: Features, features_b: Features | Gaussian) -> float:
    """Squared Frechet distance between the Gaussians fitted to features [N, D] and [M, D], in float64.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_b^1/2 C_a C_b^1/2)^1/2) (Dowson & Landau 1982; as FID: Heusel et al., arXiv
    1706.08500, whose inner product has the same trace but is not symmetric). With fewer images than features the
    covariance is singular. The distance is still defined, but grows with the missing ranks.
    """
    if isinstance(features_b, Gaussian):
        a, b = _checked("features_a", features_a), features_b
        _same_size(a.shape, (b.count or len(a), len(b.mean)))
    else:
        a, second = _pair(features_a, features_b)
        b = fit(second)
    centred = (a - a.mean(dim=0)) / (len(a) - 1) ** 0.5
    if len(a) < a.shape[1]:  # C_a = X^T X has the rank of X: the smaller matrix has the same eigenvalues
        product = centred @ b.covariance @ centred.T
    else:
        product = b.root @ (centred.T @ centred) @ b.root
    # Negative eigenvalues are rounding errors.
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    shift = (a.mean(dim=0) - b.mean).square().sum()
    return float(shift + centred.square().sum() + b.covariance.trace() - 2 * cross)


def fd_infinity(features: Features, reference: Features | Gaussian, points: int = 15, seed: int = 0) -> float:
    """The Frechet distance that infinitely many samples would have (Chong & Forsyth 2020, arXiv 1911.07023).

    The distance of n samples is nearly linear in 1/n. A line is fitted to `points` seeded random subsets of features
    [N, D], with evenly spaced sizes from N / 10 (2 D if that is larger, but at most N / 2) to N. Its value at 1/n = 0
    is returned. The reference keeps its own size, and so its own, much smaller, bias. Raises ValueError for fewer than
    `fewest_for_infinity(D)` features: below D the distance is not linear in 1/n.
    """
    x = _checked("features", features)
    if len(x) < fewest_for_infinity(x.shape[1]):
        raise ValueError(
            f"fd_infinity of {len(x)} features of {x.shape[1]} values: the fit against 1/N needs "
            f"{fewest_for_infinity(x.shape[1])} or more"
        )
    b = reference if isinstance(reference, Gaussian) else fit(reference)
    fewest = max(len(x) // 10, min(2 * x.shape[1], len(x) // 2))
    sizes = np.linspace(fewest, len(x), points).astype(int)
    random = np.random.default_rng(seed)
    values = [frechet_distance(x[torch.from_numpy(random.permutation(len(x))[:size])], b) for size in sizes]
    return float(np.polynomial.Polynomial.fit(1 / sizes, values, 1)(0.0))


def fewest_for_infinity(size: int) -> int:
    """The number of samples that the fit against 1/N needs for features of `size` values: half of them still have full
    rank.
    """
    return max(FEWEST, 2 * size)


def kid(
    features_a: Features, features_b: Features, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance (mean, standard error) of features [N, D] and [M, D]. Its mean is 0 for equal sources.

    The mean over random subsets, of min(size, N, M) features each, of the unbiased squared MMD with the kernel (x.y / D
    + 1)^3 (Binkowski et al., arXiv 1801.01401). The error is the spread over the subsets / sqrt(subsets): it does not
    show how much another N features would change the mean.
    """
    # Products in float32 and sums in float64 give the mean 7 digits, in half of the time.
    a, b = (features.float() for features in _pair(features_a, features_b))
    size = min(size, len(a), len(b))
    random = np.random.default_rng(seed)
    values = torch.empty(subsets, dtype=torch.float64)
    for index in range(subsets):
        x = a[torch.from_numpy(random.choice(len(a), size, replace=False))]
        y = b[torch.from_numpy(random.choice(len(b), size, replace=False))]
        within = sum(_kernel_sum(part, part) - (part.square().mean(dim=1) + 1).double().pow(3).sum() for part in (x, y))
        values[index] = within / (size * (size - 1)) - 2 * _kernel_sum(x, y) / size**2
    error = float(values.std()) / subsets**0.5 if subsets > 1 else float("nan")
    return float(values.mean()), error


def _pair(features_a: Features, features_b: Features) -> tuple[Tensor, Tensor]:
    shapes = [tuple(np.shape(features)) for features in (features_a, features_b)]
    _same_size(*shapes)
    return _checked("features_a", features_a), _checked("features_b", features_b)


def _same_size(a: Sequence[int], b: Sequence[int]) -> None:
    if len(a) != 2 or len(b) != 2 or a[1] != b[1] or min(a[0], b[0]) < 2:
        raise ValueError(
            f"features have shapes {tuple(a)} and {tuple(b)}; "
            "give [N, D] and [M, D] of the same D, with two rows or more"
        )


def _checked(name: str, features: Features) -> Tensor:
    x = torch.as_tensor(features).detach().cpu().double()
    _same_size(x.shape, x.shape)
    if not torch.isfinite(x).all():
        rows = (~torch.isfinite(x)).any(dim=1).sum()
        raise ValueError(f"{name} has {rows} of {len(x)} rows with values that are not finite")
    return x


def _symmetric_root(matrix: Tensor) -> Tensor:
    """The square root of a positive semidefinite matrix. Negative eigenvalues are rounding errors and become zero."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """The sum of (x_i.y_j / D + 1)^3 over all pairs, float64."""
    base = torch.addmm(torch.ones((), dtype=x.dtype), x, y.T, alpha=1 / x.shape[1])
    return base.square().mul_(base).sum(dtype=torch.float64)
