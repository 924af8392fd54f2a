"""Solvers of dx/dt = velocity(x, t) from noise at t = 1 to image at t = 0, their times, and curvature.

Solvers are pure functions of one signature: a velocity, noise z [B, ...] and descending times.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]  # (x [B, ...], t) -> [B, ...]


class Counted:
    """A velocity that counts its calls: `nfe`, the number of function evaluations."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity
        self.nfe = 0

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.nfe += 1
        return self.velocity(x, t)


def uniform_times(intervals: int) -> list[float]:
    """intervals + 1 times, uniform from 1 to 0."""
    return [1 - i / intervals for i in range(intervals + 1)]


def square_times(intervals: int) -> list[float]:
    """t = u^2 with u uniform from 1 to 0: finer near the image."""
    return [u**2 for u in uniform_times(intervals)]


def euler(velocity: Velocity, z: Tensor, times: Sequence[float]) -> Tensor:
    """Euler's method, first order: N intervals, NFE = N."""
    x = z
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity: Velocity, z: Tensor, times: Sequence[float]) -> Tensor:
    """Heun's method, second order, with an Euler last step (Karras et al. 2022): NFE = 2N - 1."""
    x = z
    for t, t_next in pairwise(times[:-1]):
        slope = velocity(x, t)
        ahead = x + (t_next - t) * slope
        x = x + (t_next - t) * (slope + velocity(ahead, t_next)) / 2
    return euler(velocity, x, times[-2:])


@torch.no_grad()
def sample(velocity: Velocity, z: Tensor, nfe: int, sampler: str) -> Tensor:
    """Images from noise z [B, ...] with exactly `nfe` evaluations, at times t = u^2.

    Raises ValueError for an unknown sampler, or an NFE that it cannot have (Heun takes 2N - 1).
    """
    counted = Counted(velocity)
    if nfe < 1:
        raise ValueError(f"nfe = {nfe}: a sampler needs at least one evaluation")
    if sampler == "euler":
        x = euler(counted, z, square_times(nfe))
    elif sampler == "heun":
        if nfe % 2 == 0:
            raise ValueError(f"nfe = {nfe}: Heun with an Euler last step takes 2N - 1; use an odd number")
        x = heun(counted, z, square_times((nfe + 1) // 2))
    else:
        raise ValueError(f"sampler = {sampler!r} is unknown; use 'heun' or 'euler'")
    if counted.nfe != nfe:
        raise RuntimeError(f"{sampler} took {counted.nfe} evaluations where {nfe} were asked for")
    return x


@torch.no_grad()
def curvature(velocity: Velocity, z: Tensor, steps: int = 128) -> Tensor:
    """kappa = E int (1/d) || v(x_t, t) - (x_1 - x_0) ||^2 dt along generated paths: a float64 scalar.

    Paths are `steps` uniform Euler steps from z [B, ...]; the mean is over paths and dimensions, and 0
    means straight. On that grid x_1 - x_0 is the path's mean velocity, so the integral is v's variance.
    """
    x = z
    mean = torch.zeros_like(z, dtype=torch.float64)
    square = torch.zeros_like(mean)
    for t, t_next in pairwise(uniform_times(steps)):
        v = velocity(x, t)
        x = x + (t_next - t) * v
        mean += v.double() / steps
        square += v.double().square() / steps
    return (square - mean.square()).mean()
