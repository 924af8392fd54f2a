"""Solvers of dx/dt = velocity(x, t) from noise at t = 1 to image at t = 0, their times, and curvature.

Solvers are pure functions with one signature: a velocity, noise z [B, ...] and descending times. Stochastic ones take
the noise that they add and how much of it besides.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from nfm.trainers.nfe import intervals

Velocity = Callable[[Tensor, float], Tensor]  # (x [B, ...], t) -> [B, ...]
Fresh = Callable[[int], Tensor]  # the number of an interval -> standard normal noise [B, ...]
Diffusion = Callable[[float], float]


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


def midpoint(velocity: Velocity, z: Tensor, times: Sequence[float]) -> Tensor:
    """The midpoint rule, second order: NFE = 2N."""
    x = z
    for t, t_next in pairwise(times):
        half = (t_next - t) / 2
        x = x + (t_next - t) * velocity(x + half * velocity(x, t), t + half)
    return x


def rk4(velocity: Velocity, z: Tensor, times: Sequence[float]) -> Tensor:
    """The classic Runge-Kutta method, fourth order: NFE = 4N."""
    x = z
    for t, t_next in pairwise(times):
        step = t_next - t
        first = velocity(x, t)
        second = velocity(x + step / 2 * first, t + step / 2)
        third = velocity(x + step / 2 * second, t + step / 2)
        fourth = velocity(x + step * third, t_next)
        x = x + step / 6 * (first + 2 * second + 2 * third + fourth)
    return x


def reverse_drift(velocity: Velocity, x: Tensor, t: float, diffusion: Diffusion) -> Tensor:
    """v - D s, the drift of the reverse SDE dx = (v - D s) dt + sqrt(2 D) dw, whose x_t has the same distribution.

    Ma et al. 2024 ("SiT", arXiv 2401.08740), equations 5 and 9; D is half of its w_t, as in its code. On the path
    x_t = (1 - t) image + t noise the score is s = -(x + (1 - t) v) / t: x + (1 - t) v is the noise that is expected.
    """
    slope = velocity(x, t)
    return slope + diffusion(t) / t * (x + (1 - t) * slope)


def sde_euler(velocity: Velocity, z: Tensor, times: Sequence[float], fresh: Fresh, diffusion: Diffusion) -> Tensor:
    """Euler and Maruyama's method for the reverse SDE, with a last step of the ODE: NFE = N."""
    x = z
    for step, (t, t_next) in enumerate(pairwise(times[:-1])):
        ahead = x + (t_next - t) * reverse_drift(velocity, x, t, diffusion)
        x = ahead + math.sqrt(2 * diffusion(t) * (t - t_next)) * fresh(step)
    return euler(velocity, x, times[-2:])


def sde_heun(velocity: Velocity, z: Tensor, times: Sequence[float], fresh: Fresh, diffusion: Diffusion) -> Tensor:
    """Heun's method for the drift after the noise of each interval, with a last step of the ODE: NFE = 2N - 1.

    As in Karras et al. 2022 (arXiv 2206.00364, algorithm 2) and SiT's code. It is of first order, as the noise is.
    """
    x = z
    for step, (t, t_next) in enumerate(pairwise(times[:-1])):
        x = x + math.sqrt(2 * diffusion(t) * (t - t_next)) * fresh(step)
        slope = reverse_drift(velocity, x, t, diffusion)
        ahead = x + (t_next - t) * slope
        x = x + (t_next - t) * (slope + reverse_drift(velocity, ahead, t_next, diffusion)) / 2
    return euler(velocity, x, times[-2:])


# With the same names as their costs in `nfe`.
SOLVERS = {"euler": euler, "heun": heun, "midpoint": midpoint, "rk4": rk4}
STOCHASTIC = {"sde-euler": sde_euler, "sde-heun": sde_heun}
# The forms of SiT's code. Its times begin at the noise, so its "decreasing" is this; its "linear" is "sigma" here.
DIFFUSIONS: dict[str, Diffusion] = {
    "sigma": lambda t: t,
    "constant": lambda t: 1.0,
    "sin^2": lambda t: math.sin(math.pi * t) ** 2,
    "decreasing": lambda t: math.sin(math.pi * t / 2) ** 4,
}
GRIDS = {"uniform": uniform_times, "square": square_times}


@torch.no_grad()
def sample(
    velocity: Velocity,
    z: Tensor,
    nfe: int,
    solver: str,
    grid: str = "square",
    fresh: Fresh | None = None,
    diffusion: str = "sigma",
) -> Tensor:
    """Images from noise z [B, ...] with exactly `nfe` evaluations, at the times of `grid`.

    A stochastic solver adds the noise that `fresh` gives, as much as `diffusion` names. Raises ValueError for an
    unknown solver, grid or diffusion, an NFE that the solver cannot have, and a stochastic solver without noise.
    """
    if grid not in GRIDS:
        raise ValueError(f"grid = {grid!r} is unknown; there are {', '.join(GRIDS)}")
    if diffusion not in DIFFUSIONS:
        raise ValueError(f"diffusion = {diffusion!r} is unknown; there are {', '.join(DIFFUSIONS)}")
    counted, times = Counted(velocity), GRIDS[grid](intervals(solver, nfe))
    if solver not in STOCHASTIC:
        x = SOLVERS[solver](counted, z, times)
    elif fresh is None:
        raise ValueError(f"solver = {solver!r} adds noise, and there is none; give it, or take {', '.join(SOLVERS)}")
    else:
        x = STOCHASTIC[solver](counted, z, times, fresh, DIFFUSIONS[diffusion])
    if counted.nfe != nfe:
        raise RuntimeError(f"{solver} took {counted.nfe} evaluations where {nfe} were asked for")
    return x


@torch.no_grad()
def dopri5(velocity: Velocity, z: Tensor, rtol: float = 1e-5, atol: float = 1e-5) -> tuple[Tensor, int]:
    """The reference solver: images from noise z [B, ...] by adaptive Dormand-Prince 5(4), and the NFE that it took.

    The whole batch shares its steps, so an image depends on its batch within the tolerances. Raises ImportError, with
    the remedy, if torchdiffeq is missing.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError("dopri5 needs torchdiffeq, which is not installed: `pip install torchdiffeq`") from error
    counted = Counted(velocity)
    times = torch.tensor([1.0, 0.0], dtype=torch.float64, device=z.device)
    # The last step ends exactly at t = 0. By default it would go beyond, where no network was trained.
    options = {"step_t": times[1:]}
    path = odeint(lambda t, x: counted(x, float(t)), z, times, rtol=rtol, atol=atol, method="dopri5", options=options)
    return path[-1], counted.nfe


@torch.no_grad()
def curvature(velocity: Velocity, z: Tensor, steps: int = 128) -> Tensor:
    """kappa = E int (1/d) || v(x_t, t) - (x_1 - x_0) ||^2 dt along generated paths: a float64 scalar.

    Paths are `steps` uniform Euler steps from z [B, ...]. The mean is over paths and dimensions; 0 means straight. On
    this grid x_1 - x_0 is the mean velocity of the path, so the integral is the variance of v.
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
