"""Solvers of dx/dt = v(x, t) from noise (t = 1) to data (t = 0), the grid of times, and a path's curvature.

Solvers are pure functions of one signature: velocity(x, t) with t a float, x [B, ...], times descending.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


def square_times(intervals: int) -> list[float]:
    """N intervals from 1 to 0 with t = u^2, u uniform: finer towards the data."""
    return [(1 - i / intervals) ** 2 for i in range(intervals + 1)]


def uniform_times(intervals: int) -> list[float]:
    """N equal intervals from 1 to 0."""
    return [1 - i / intervals for i in range(intervals + 1)]


def euler(velocity: Velocity, z: Tensor, times: Sequence[float]) -> Tensor:
    """Euler's method: one evaluation an interval, NFE = N."""
    x = z
    for t, t_next in zip(times, times[1:]):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity: Velocity, z: Tensor, times: Sequence[float]) -> Tensor:
    """Heun's second-order method with an Euler last step (Karras et al. 2022, algorithm 1): NFE = 2N - 1."""
    x = z
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        slope = velocity(x, t)
        ahead = x + (t_next - t) * slope
        last = i == len(times) - 2
        x = ahead if last else x + (t_next - t) * (slope + velocity(ahead, t_next)) / 2
    return x


def sample(velocity: Velocity, z: Tensor, nfe: int, sampler: str) -> Tensor:
    """Noise z [B, ...] to images in exactly `nfe` evaluations, on the grid t = u^2.

    Raises ValueError for an unknown sampler, or an NFE that Heun's method cannot have (it takes 2N - 1).
    """
    if sampler == "euler":
        return euler(velocity, z, square_times(nfe))
    if sampler == "heun":
        if nfe % 2 == 0:
            raise ValueError(f"nfe = {nfe}: Heun's method with an Euler last step takes 2N - 1; use an odd number")
        return heun(velocity, z, square_times((nfe + 1) // 2))
    raise ValueError(f"sampler {sampler!r}: there are 'euler' and 'heun'")


def curvature(velocity: Velocity, z: Tensor, steps: int = 128) -> Tensor:
    """kappa = E int (1/d) |v(x_t, t) - (x_1 - x_0)|^2 dt along generated paths; 0 for straight ones.

    x_1 is the noise z [B, ...], x_0 the path's end after `steps` uniform Euler steps; the mean is over dimensions
    and examples. Holds one velocity of every step in memory's place by its sums: |v|^2 and v itself.
    """
    x, times = z, uniform_times(steps)
    squares = torch.zeros_like(z, dtype=torch.float64)
    total = torch.zeros_like(z, dtype=torch.float64)
    for t, t_next in zip(times, times[1:]):
        v = velocity(x, t)
        x = x + (t_next - t) * v
        squares += v.double().square() * (t - t_next)
        total += v.double() * (t - t_next)
    # The integral of v over the path is x_1 - x_0 itself, so int |v - D|^2 dt = int |v|^2 dt - |D|^2.
    return (squares - total.square()).mean()
