"""Compares noise vectors with N(0, I): moments of every dimension, and Kolmogorov-Smirnov on projections."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PROJECTIONS = 64


class Deviation(NamedTuple):
    """How far the dimensions are from normal: the root mean square and the worst of each figure over dimensions."""

    mean: float  # of mean - 0
    mean_worst: float
    var: float  # of variance - 1
    var_worst: float
    kurtosis: float  # of kurtosis - 3
    kurtosis_worst: float


class Projected(NamedTuple):
    """Kolmogorov-Smirnov of projections: mean statistic; the smallest p-value, times the number of projections."""

    statistic: float
    p: float


def deviation(z: Tensor) -> Deviation:
    """The moments of each dimension of z [N, D] compared with those of N(0, 1); N must be at least 2.

    For comparison, compute them for N new normal vectors too.
    """
    mean = _by_parts(z, torch.zeros(z.shape[1], dtype=torch.float64), 1)
    second, fourth = _by_parts(z, mean, 2), _by_parts(z, mean, 4)
    kurtosis = torch.where(second > 0, fourth / second.square().clamp_min(1e-300), torch.zeros_like(second))
    figures = [_rms_and_worst(values) for values in (mean, second - 1, kurtosis - 3)]
    return Deviation(*(number for pair in figures for number in pair))


def projected(z: Tensor, seed: int, projections: int = PROJECTIONS) -> Projected:
    """Kolmogorov-Smirnov of z [N, D] along seeded random unit vectors, against N(0, 1)."""
    from scipy.stats import kstwo

    random = torch.Generator().manual_seed(seed)
    directions = torch.randn(z.shape[1], projections, generator=random)
    along = (z @ (directions / directions.norm(dim=0))).double().sort(dim=0).values
    below = torch.special.ndtr(along)
    ranks = torch.arange(len(z) + 1, dtype=torch.float64)[:, None] / len(z)
    statistics = torch.maximum((ranks[1:] - below).amax(0), (below - ranks[:-1]).amax(0))
    p = float(kstwo.sf(float(statistics.max()), len(z)))
    return Projected(float(statistics.mean()), min(1.0, projections * p))


def _by_parts(z: Tensor, centre: Tensor, power: int, rows: int = 1024) -> Tensor:
    """The mean of (z - centre)^power in float64, [D], without a float64 copy of all of z."""
    total = torch.zeros(z.shape[1], dtype=torch.float64)
    for part in z.split(rows):
        apart = part.double() - centre
        total += (apart**power).sum(0)
    return total / len(z)


def _rms_and_worst(values: Tensor) -> tuple[float, float]:
    return float(values.square().mean().sqrt()), float(values[values.abs().argmax()])
