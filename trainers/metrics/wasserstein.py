"""Wasserstein-2 distances between two sets of points: exact by assignment, and sliced.

Both are square roots, in the units of the points: a shift of all points by s has the distance |s| (exact), or |s| /
sqrt(D) (sliced, in the mean over directions).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

Points = Tensor | npt.NDArray[np.generic]  # [N, ...], one point in each row


def wasserstein2(x: Points, y: Points) -> float:
    """sqrt(min over permutations p of mean_i |x_i - y_p(i)|^2), exact, for two sets of points [N, ...].

    Scipy's assignment takes about a second for N = 2,000 in the plane, and N^2 float64 of memory. The distance of two
    samples of one distribution is not 0: compare it with that of held-out points to training points at the same N.

    Raises ValueError for different numbers of points, different shapes, or values that are not finite.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    a, b = _pair(x, y)
    if len(a) != len(b):
        raise ValueError(f"x has {len(a)} points and y {len(b)}: an assignment needs as many of either; cut the longer")
    cost = cdist(a, b, "sqeuclidean")
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


def sliced_wasserstein(x: Points, y: Points, projections: int = 128, seed: int = 0) -> float:
    """sqrt of the mean over seeded random directions of the squared W2 of the projected points, [N, ...] and [M, ...].

    It is exact along each direction: points are matched by rank, also if N and M differ (Bonneel et al. 2015,
    doi:10.1007/s10851-014-0506-3). Raises ValueError for different shapes, or values that are not finite.
    """
    a, b = _pair(x, y)
    if projections < 1:
        raise ValueError(f"projections is {projections}: at least one direction is needed")
    directions = np.random.default_rng(seed).standard_normal((a.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    # Quantiles change at multiples of 1/N and 1/M. In units of 1/(N M) they are exact integers.
    ends = np.union1d(np.arange(1, len(a) + 1) * len(b), np.arange(1, len(b) + 1) * len(a))
    mass = np.diff(ends, prepend=0) / (len(a) * len(b))
    rows_a, rows_b = (ends - 1) // len(b), (ends - 1) // len(a)
    total = 0.0
    for direction in directions.T:  # one at a time, to save memory
        gap = np.sort(a @ direction)[rows_a] - np.sort(b @ direction)[rows_b]
        total += float(mass @ (gap * gap))
    return float(np.sqrt(total / projections))


def _pair(x: Points, y: Points) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    a, b = _array(x), _array(y)
    if a.ndim < 2 or a.shape[1:] != b.shape[1:] or not len(a) or not len(b):
        raise ValueError(f"x has shape {a.shape} and y {b.shape}; give [N, ...] and [M, ...] of the same points")
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    for name, points in (("x", a), ("y", b)):
        if bad := int((~np.isfinite(points)).any(axis=1).sum()):
            raise ValueError(f"{name} has {bad} of {len(points)} points with values that are not finite")
    return a, b


def _array(points: Points) -> npt.NDArray[np.float64]:
    values = points.detach().cpu().numpy() if isinstance(points, Tensor) else points
    return np.asarray(values, np.float64)
