"""Distances between sets of features: the Frechet distance of fitted Gaussians, and the kernel distance."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Features = Tensor | np.ndarray


def frechet_distance(features_a: Features, features_b: Features) -> float:
    """Squared Frechet distance between the Gaussians fitted to features [N, D] and [M, D], in float64.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) (Dowson & Landau 1982; as FID, Heusel et al.,
    arXiv 1706.08500, whose inner product has the same trace but is not symmetric). With fewer images than
    features the covariance is singular; the distance is still defined but grows with the missing ranks.
    """
    a, b = _pair(features_a, features_b)
    covariance_a, covariance_b = (
        torch.cov(a.T).reshape(a.shape[1], -1),
        torch.cov(b.T).reshape(b.shape[1], -1),
    )
    root = _symmetric_root(covariance_a)
    cross = _symmetric_root(root @ covariance_b @ root)
    shift = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return float(shift + covariance_a.trace() + covariance_b.trace() - 2 * cross.trace())


def kid(
    features_a: Features, features_b: Features, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance (mean, standard error) of features [N, D] and [M, D]; its mean is 0 for equal sources.

    The mean over random subsets, of min(size, N, M) features each, of the unbiased squared MMD with the
    kernel (x.y / D + 1)^3 (Binkowski et al., arXiv 1801.01401). The error is the spread over the subsets /
    sqrt(subsets): it does not tell how much another N features would change the mean.
    """
    a, b = _pair(features_a, features_b)
    size = min(size, len(a), len(b))
    random = np.random.default_rng(seed)
    values = torch.empty(subsets, dtype=torch.float64)
    for index in range(subsets):
        x = a[torch.from_numpy(random.choice(len(a), size, replace=False))]
        y = b[torch.from_numpy(random.choice(len(b), size, replace=False))]
        within = _off_diagonal_sum(_kernel(x, x)) + _off_diagonal_sum(_kernel(y, y))
        values[index] = within / (size * (size - 1)) - 2 * _kernel(x, y).mean()
    error = float(values.std()) / subsets**0.5 if subsets > 1 else float("nan")
    return float(values.mean()), error


def _pair(features_a: Features, features_b: Features) -> tuple[Tensor, Tensor]:
    a, b = (torch.as_tensor(features).detach().cpu().double() for features in (features_a, features_b))
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features have shapes {tuple(a.shape)} and {tuple(b.shape)}; "
            "give [N, D] and [M, D] of the same D, with two rows or more"
        )
    for name, features in (("features_a", a), ("features_b", b)):
        if not torch.isfinite(features).all():
            rows = (~torch.isfinite(features)).any(dim=1).sum()
            raise ValueError(f"{name} has {rows} of {len(features)} rows with values that are not finite")
    return a, b


def _symmetric_root(matrix: Tensor) -> Tensor:
    """Square root of a positive semidefinite matrix; eigenvalues below zero are rounding and become zero."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    base = x @ y.T / x.shape[1] + 1
    return base * base * base


def _off_diagonal_sum(matrix: Tensor) -> Tensor:
    return matrix.sum() - matrix.trace()
