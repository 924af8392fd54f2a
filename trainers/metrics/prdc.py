"""Precision, recall, density and coverage: how far two sets of features lie in each other's neighbourhoods.

The manifold of a set is the union of balls around its members. The radius of each is the distance to its k-th nearest
other member.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

K = 5
CHUNK = 1000  # rows of distances held at a time


class Manifold(NamedTuple):
    """The members of a set [N, D] and their radii [N], float64. Keep it to compare many sets with one."""

    members: Tensor
    radii: Tensor


class Prdc(NamedTuple):
    """Shares in [0, 1], except density, which is unbounded. All are near 1 for two samples of one distribution."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(features: Tensor | np.ndarray, k: int = K) -> Manifold:
    """The members and radii of features [N, D], N > k.

    Raises ValueError for fewer, or for values that are not finite.
    """
    x = torch.as_tensor(features).detach().cpu().double()
    if x.dim() != 2 or len(x) <= k:
        raise ValueError(f"features have shape {tuple(x.shape)}; give [N, D] of more than k = {k} rows")
    if not torch.isfinite(x).all():
        raise ValueError("features have values that are not finite")
    parts = []
    for start in range(0, len(x), CHUNK):
        # |a - b|^2 computed by products would have a rounding error at the distance of a member to itself, which is 0.
        gaps = _squared(x[start : start + CHUNK], x)
        own = torch.arange(len(gaps))
        gaps[own, start + own] = 0
        parts.append(gaps.topk(k + 1, dim=1, largest=False).values[:, -1])
    return Manifold(x, torch.cat(parts).sqrt())


def prdc(real: Manifold, fake: Manifold, k: int = K) -> Prdc:
    """All four figures of the samples `fake` against `real`. Both need the same k, and should have the same size.

    Precision is the share of samples in the real manifold, recall the share of real members in the manifold of the
    samples (Kynkaanniemi et al. 2019, arXiv 1904.06991). Density is the number of real balls that a sample lies in,
    divided by k; coverage is the share of real balls that contain a sample (Naeem et al. 2020, arXiv 2002.09797). The
    last two use only the real balls, which outliers among the samples cannot enlarge.
    """
    if real.members.shape[1] != fake.members.shape[1]:
        sizes = real.members.shape[1], fake.members.shape[1]
        raise ValueError(f"features have {sizes[0]} and {sizes[1]} dimensions; take both from one network")
    within = torch.zeros(len(fake.members), dtype=torch.float64)  # the number of real balls around each sample
    recalled = covered = 0
    for start in range(0, len(real.members), CHUNK):
        gaps = _squared(real.members[start : start + CHUNK], fake.members)
        inside = gaps <= real.radii[start : start + CHUNK, None].square()
        within += inside.sum(dim=0)
        covered += int(inside.any(dim=1).sum())
        recalled += int((gaps <= fake.radii.square()).any(dim=1).sum())
    count = len(real.members)
    precision, density = float((within > 0).double().mean()), float(within.mean()) / k
    return Prdc(precision, recalled / count, density, covered / count)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2: [N, D] and [M, D] -> [N, M]."""
    gaps = torch.addmm(b.square().sum(dim=1), a, b.T, alpha=-2)
    return gaps.add_(a.square().sum(dim=1, keepdim=True)).clamp_min_(0)
